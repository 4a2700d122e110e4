// The tiles that a thread block computes a second time, with more care than speed: those whose numbers show that the
// fast way was not good enough (repair.cuh, exceptional.cuh).
//
// A warp that multiplies marks the stage of shared memory that its tile has. When the producer warp takes the stage for
// another tile it puts the marked one on the thread block's list, a chain through global memory. After the last tile
// all roles meet, and start once more on the tiles of the list. Parts of a tile can be marked apart (kMarkers).
#pragma once
#include "ptx/barrier.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"

namespace selfattn::cuda::sm90 {

// In shared memory.
template <int kStages, int kMarkers = 1>
struct RepairList {
  static constexpr int kEnd = -1, kAllMarks = (1 << kMarkers) - 1;

  int tile[kStages];                 // the number of the tile of each stage
  int is_marked[kStages][kMarkers];  // whether it (this part of it) is computed once more
  int is_any_marked;                 // of all tiles so far
  int first;                         // of the list: a tile's number and behind it a bit for each marker

  __device__ __forceinline__ void clear() {
    for (auto& of_stage : is_marked)
      for (int& marked : of_stage) marked = 0;
    is_any_marked = 0, first = kEnd;
  }

  // Without a branch: behind one that lanes may take apart, ptxas no longer keeps matrix descriptors in uniform
  // registers.
  __device__ __forceinline__ void mark_if(bool condition, int stage, int marker = 0) {
    ptx::store_shared_if(condition, ptx::shared_address(&is_marked[stage][marker]), 1);
    ptx::store_shared_if(condition, ptx::shared_address(&is_any_marked), 1);
  }

  // By one thread, when nobody is at the stage's tile any more. g_next: what stands behind each tile of a list.
  __device__ __forceinline__ void list_if_marked(int stage, int* g_next) {
    int marks = 0;
    for (int i = 0; i < kMarkers; i++) {
      marks |= is_marked[stage][i] << i;
      is_marked[stage][i] = 0;
    }
    if (!marks) return;
    g_next[tile[stage]] = first;
    first = tile[stage] << kMarkers | marks;
  }
  __device__ __forceinline__ void take_stage(int stage, int number, int* g_next) {
    list_if_marked(stage, g_next);
    tile[stage] = number;
  }

  // The next tile of the list, and which markers marked it; or `none`.
  __device__ __forceinline__ int take(const int* g_next, int none, int& marks) {
    if (first == kEnd) return none;
    const int number = first >> kMarkers;
    marks = first & kAllMarks;
    first = g_next[number];
    return number;
  }
  __device__ __forceinline__ int take(const int* g_next, int none) {
    int marks;
    return take(g_next, none, marks);
  }
};

// Between the passes, by all kThreads threads of the roles, which reach it in their own branches: whether there is a
// second pass, which `is_wanted` asks for in any case. If so, every marked tile is on the list, and renew_barriers has
// set the roles' barriers up again.
template <int kBarrier, int kThreads, int kStages, int kMarkers, class Renew>
__device__ __forceinline__ bool begin_repair(RepairList<kStages, kMarkers>& list, int* g_next, bool is_wanted,
                                             const Renew& renew_barriers) {
  ptx::barrier_sync(kBarrier, kThreads);
  if (!list.is_any_marked && !is_wanted) return false;
  ptx::bulk_wait<0>();  // what this thread has sent out must not come after the repaired tile
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; stage++) list.list_if_marked(stage, g_next);
    renew_barriers();
  }
  ptx::barrier_sync(kBarrier, kThreads);
  return true;
}

}  // namespace selfattn::cuda::sm90
