// A hash table of the runs of one side or both of a batch row, by id, in the shared memory of a thread block. It tells
// whether an id comes back, and of a run on one side where that of the same id starts on the other.
#pragma once
#include "runs.cuh"

namespace selfattn::cuda {

class RunTable {
 public:
  // Slots for a row of queries: enough for runs of 11 tokens in the mean, of 86 in the longest rows.
  static __host__ __device__ constexpr int slots_for(int query_length) {
    constexpr int kTokensPerSlot = 8, kMostSlots = 1 << 13;
    int slots = kWarpSize;
    while (slots < kMostSlots && slots * kTokensPerSlot < query_length) slots *= 2;
    return slots;
  }
  // Of shared memory, in words, for one side or both.
  static __host__ __device__ constexpr int storage_words(int slots, int sides) {
    return slots * (sides == 1 ? 1 : 1 + sides);
  }

  __device__ RunTable(int* storage, int slots) : ids_(storage), slots_(slots) {}  // a power of two

  // Called by the whole thread block. `row` has runs(side) and ids(side) of its sides, queries before keys. Of one
  // side: whether every id fills one run. Of two: whether every id that both have fills one run on each. Also false
  // where the queries have more runs than the slots are for. Every thread block of a row comes to the same answer.
  template <int kSides, class Row>
  __device__ __forceinline__ bool fill(const Row& row) const {
    __shared__ int s_runs, s_is_repeated;
    if (threadIdx.x == 0) s_runs = s_is_repeated = 0;
    for (int i = threadIdx.x; i < storage_words(slots_, kSides); i += blockDim.x) ids_[i] = kNone;
    __syncthreads();
    const int runs = __reduce_add_sync(kAllLanes, row.runs(0).count_starts());
    if (lane_of_thread() == 0) atomicAdd(&s_runs, runs);
    __syncthreads();
    if (s_runs > static_cast<int>(slots_ / 4 * 3)) return false;  // which bounds the search for a free slot
#pragma unroll 1
    for (int side = 0; side < kSides; side++) {
      const auto ids = row.ids(side);
      row.runs(side).visit_starts([&](int start) {
        if (*static_cast<volatile int*>(&s_is_repeated)) return;
        const int id = ids[start];
        unsigned slot = first_slot(id);
        int found;  // a free slot is taken for a run of queries
        while ((found = atomicCAS(ids_ + place(slot), kNone, side == 0 ? id : kNone)) != kNone && found != id) slot++;
        if (kSides == 1) {
          if (found == id) s_is_repeated = 1;
        } else if (side == 0) {
          if (found == id)
            *start_in(slot, 1) = kRepeated;
          else
            *start_in(slot, 0) = start;
        } else if (found == id && atomicExch(start_in(slot, 1), start) != kNone) {
          s_is_repeated = 1;
        }
      });
      __syncthreads();
    }
    return !s_is_repeated;
  }

  // After fill() of both sides: where the run of the id starts on a side; negative where the other has none.
  __device__ int find(int id, int side) const {
    for (unsigned slot = first_slot(id);; slot++) {
      const int found = ids_[place(slot)];
      if (found == id) return *start_in(slot, side);
      if (found == kNone) return kNone;
    }
  }

 private:
  static constexpr int kNone = -1, kRepeated = -2;

  static __device__ unsigned first_slot(int id) { return static_cast<unsigned>(id) * 0x9E3779B1u >> 16; }
  __device__ unsigned place(unsigned slot) const { return slot & (slots_ - 1); }
  __device__ int* start_in(unsigned slot, int side) const { return ids_ + (1 + side) * slots_ + place(slot); }

  int* ids_;  // (slots) of the queries, or kNone; then for each of two sides (slots) the starts of the runs
  unsigned slots_;
};

}  // namespace selfattn::cuda
