// The runs of equal ids of a batch row, found by one thread block in its own shared memory: its warps mark a stretch of
// the row each, tell each other what they saw, and note for every word of 32 tokens where the nearest run starts
// outside it. The work does not depend on how long the runs are.
#pragma once
#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

#include "flash/tile/constants.h"
#include "ptx/prefetch.cuh"
#include "row_ids.cuh"

namespace selfattn::cuda {

constexpr unsigned kAllLanes = ~0u;

__device__ __forceinline__ int lane_of_thread() { return threadIdx.x % kWarpSize; }
__device__ __forceinline__ int warp_of_thread() { return threadIdx.x / kWarpSize; }
__device__ __forceinline__ int highest_bit(unsigned bits) { return 31 - __clz(bits); }
__device__ __forceinline__ int lowest_bit(unsigned bits) { return __ffs(bits) - 1; }
__device__ __forceinline__ unsigned bits_below(int bit) { return (1u << bit) - 1; }
__device__ __forceinline__ unsigned bits_above(int bit) { return ~1u << bit; }

// Eight neighbouring ids as they lie in memory; padding where there is no token.
constexpr int kOctet = 8;
template <class Id>
struct Octet {
  static constexpr int kVectors = kOctet * sizeof(Id) / sizeof(int4);
  union {
    int4 vectors[kVectors];
    Id ids[kOctet];
  };

  __device__ __forceinline__ void load(const IdRow<Id>& row, bool is_packed, int first) {
    if (is_packed && first + kOctet <= row.length) {
#pragma unroll
      for (int i = 0; i < kVectors; i++) vectors[i] = reinterpret_cast<const int4*>(row.data + first)[i];
    } else {
      const Id* g_id = row.data + first * row.stride;
#pragma unroll
      for (int i = 0; i < kOctet; i++, g_id += row.stride) ids[i] = first + i < row.length ? *g_id : -1;
    }
  }
  __device__ __forceinline__ int operator[](int i) const { return max(IdRow<Id>::narrow(ids[i]), -1); }
};

// What a warp saw of its stretch.
struct Stretch {
  int first_word, last_word;         // that hold the start of a run, or -1
  int lowest_real_id, last_real_id;  // ids >= 0, or -1 if there is none; the lowest is the first if ids increase
  int continues;                     // its first token belongs to the run of the token before
  int increases;                     // ids at the starts of real runs (not padding) strictly increase
};

class SegmentRuns {
 public:
  static constexpr int kWarps = kWarpSize;  // of the thread block: a lane looks at a warp

  // Of shared memory, in words. Warps write whole groups of kGroup words.
  static __host__ __device__ constexpr int storage_words(int length) { return 3 * padded_words(length); }

  __device__ SegmentRuns(unsigned* storage, int length)
      : starts_(storage),
        real_(starts_ + padded_words(length)),
        word_before_(reinterpret_cast<uint16_t*>(real_ + padded_words(length))),
        word_after_(word_before_ + padded_words(length)),
        length_(length) {
    const int words = (length + kWarpSize - 1) / kWarpSize;
    const int words_per_warp = padded_words((length + kWarps - 1) / kWarps);
    first_word_ = min(warp_of_thread() * words_per_warp, words);
    last_word_ = min(first_word_ + words_per_warp, words);
  }

  // The run [begin, end) of a token; [token, token) if it is padding. In any order, after find().
  __device__ int begin(unsigned token) const {
    const int bit = token % kWarpSize;
    int word = token / kWarpSize;
    if (!(real_[word] >> bit & 1)) return token;
    unsigned starts = starts_[word] & ~bits_above(bit);
    if (!starts) word = word_before_[word], starts = starts_[word];
    return word * kWarpSize + highest_bit(starts);
  }
  __device__ int end(unsigned token) const {
    return real_[token / kWarpSize] >> token % kWarpSize & 1 ? next_start(token) : token;
  }

  // Called by the whole thread block of kWarps warps. Whether the ids at the starts of the real runs strictly increase,
  // so that each fills one run.
  template <class Id>
  __device__ bool find(const IdRow<Id>& ids) {
    __shared__ Stretch s_stretches[kWarps];
    const int warp = warp_of_thread(), lane = lane_of_thread();
    const Stretch mine = mark(ids);
    if (lane == 0) s_stretches[warp] = mine;
    __syncthreads();

    const Stretch stretch = s_stretches[lane];
    const unsigned real_before = __ballot_sync(kAllLanes, stretch.last_real_id >= 0) & bits_below(lane);
    const int id_before = __shfl_sync(kAllLanes, stretch.last_real_id, real_before ? highest_bit(real_before) : 0);
    const bool joins =
        stretch.lowest_real_id < 0 || !real_before || stretch.continues || stretch.lowest_real_id > id_before;
    const unsigned marked = __ballot_sync(kAllLanes, stretch.last_word >= 0);
    const unsigned before = marked & bits_below(warp), after = marked & bits_above(warp);
    const int word_before = __shfl_sync(kAllLanes, stretch.last_word, before ? highest_bit(before) : 0);
    const int word_after = __shfl_sync(kAllLanes, stretch.first_word, after ? lowest_bit(after) : 0);
    link_words(before ? word_before : kNoWord, after ? word_after : kNoWord);
    const bool increases = __all_sync(kAllLanes, stretch.increases && joins);
    __syncthreads();
    return increases;
  }

  // Called by the thread block, each thread for a share of the runs: visit(token) of the first token of each that is
  // not padding. After find().
  template <class Visit>
  __device__ __forceinline__ void visit_starts(const Visit& visit) const {
#pragma unroll 1
    for (int word = threadIdx.x; word * kWarpSize < length_; word += blockDim.x)
#pragma unroll 1
      for (unsigned starts = starts_[word] & real_[word]; starts; starts &= starts - 1)
        visit(word * kWarpSize + lowest_bit(starts));
  }

  // How many there are in this thread's share.
  __device__ __forceinline__ int count_starts() const {
    int count = 0;
    for (int word = threadIdx.x; word * kWarpSize < length_; word += blockDim.x)
      count += __popc(starts_[word] & real_[word]);
    return count;
  }

  // Called by the whole thread block: forgets the runs without is_kept(first token). Then begin() and end() tell
  // nothing any more, and these do: the first token of the last run kept that starts at the token or ahead of it, -1 if
  // there is none; and, given a first token, the end of its run.
  template <class IsKept>
  __device__ __forceinline__ void keep(const IsKept& is_kept) {
    __shared__ int s_last_words[kWarps];
    const int warp = warp_of_thread(), lane = lane_of_thread();
    int last_word = -1;
#pragma unroll 1
    for (int base = first_word_; base < last_word_; base += kWarpSize) {
      const int word = base + lane;
      unsigned kept = 0;
      if (word < last_word_) {
#pragma unroll 1
        for (unsigned starts = starts_[word] & real_[word]; starts; starts &= starts - 1)
          if (is_kept(word * kWarpSize + lowest_bit(starts))) kept |= starts & -starts;
        real_[word] = kept;
      }
      const unsigned marked = __ballot_sync(kAllLanes, kept != 0);
      if (marked) last_word = base + highest_bit(marked);
    }
    if (lane == 0) s_last_words[warp] = last_word;
    __syncthreads();
    const int last_of_lane = s_last_words[lane];
    const unsigned before = __ballot_sync(kAllLanes, last_of_lane >= 0) & bits_below(warp);
    const int word_before = __shfl_sync(kAllLanes, last_of_lane, before ? highest_bit(before) : 0);
    link_words_before(real_, before ? word_before : kNoWord);
    __syncthreads();
  }
  __device__ int last_kept(unsigned token) const {
    int word = token / kWarpSize;
    unsigned kept = real_[word] & ~bits_above(token % kWarpSize);
    if (!kept) {
      word = word_before_[word];
      if (word == kNoWord) return -1;
      kept = real_[word];
    }
    return word * kWarpSize + highest_bit(kept);
  }
  __device__ int end_of_kept(unsigned first) const { return next_start(first); }

 private:
  static constexpr int kGroup = kOctet;  // words that a warp marks at once: a byte a lane
  static constexpr int kNoWord = 0xFFFF;

  static __host__ __device__ constexpr int padded_words(int length) {
    return (length + kGroup * kWarpSize - 1) / (kGroup * kWarpSize) * kGroup;
  }

  // Fills in starts_ and real_ of the warp's words.
  template <class Id>
  __device__ Stretch mark(const IdRow<Id>& ids) {
    const int lane = lane_of_thread(), first_token = first_word_ * kWarpSize;
    const bool is_packed = ids.is_packed();
    auto* s_starts = reinterpret_cast<unsigned char*>(starts_);
    auto* s_real = reinterpret_cast<unsigned char*>(real_);
    Octet<Id> next;
    if (first_word_ < last_word_) next.load(ids, is_packed, first_token + lane * kOctet);
#pragma unroll 1
    for (int word = first_word_ + lane; word < last_word_; word += kWarpSize)
      ptx::prefetch_to_l2(ids.data + word * kWarpSize * ids.stride);
    // The id ahead of the group, which another warp checks. Not looked at until the group is: its load is not waited
    // for.
    int before = -1;
    if (first_word_ > 0 && first_word_ < last_word_)
      before = static_cast<int>(ids.data[(first_token - 1) * ids.stride]);

    Stretch seen{-1, -1, -1, -1, 0, 0};
    unsigned lowest_id = ~0u;
    bool falls = false;
#pragma unroll 1
    for (int word = first_word_; word < last_word_; word += kGroup) {  // one group ahead with the loads
      const Octet<Id> octet = next;
      if (word + kGroup < last_word_) next.load(ids, is_packed, (word + kGroup) * kWarpSize + lane * kOctet);

      int id[kOctet], highest_id = -1;
#pragma unroll
      for (int i = 0; i < kOctet; i++) {
        id[i] = octet[i];
        highest_id = max(highest_id, id[i]), lowest_id = min(lowest_id, static_cast<unsigned>(id[i]));
      }
      const unsigned real_before = __ballot_sync(kAllLanes, highest_id >= 0) & bits_below(lane);
      const int id_before = __shfl_sync(kAllLanes, highest_id, real_before ? highest_bit(real_before) : 0);
      int previous = __shfl_up_sync(kAllLanes, id[kOctet - 1], 1);
      if (lane == 0) previous = word == 0 ? INT_MIN : max(before, -1);
      before = __shfl_sync(kAllLanes, id[kOctet - 1], kWarpSize - 1);
      if (word == first_word_) seen.continues = id[0] >= 0 && id[0] == previous;  // right in lane 0, which passes it on

      // As long as ids increase, the last real id is the highest. Padding is above every bound.
      unsigned bound = (real_before ? id_before : seen.last_real_id) + 1u, starts = 0, padding = 0;
#pragma unroll
      for (int i = 0; i < kOctet; i++) {
        const bool is_start = id[i] != previous;
        if (is_start) starts |= 1u << i;
        falls |= is_start && static_cast<unsigned>(id[i]) < bound;
        bound = max(bound, id[i] + 1u);
        padding |= static_cast<unsigned>(id[i]) >> 31 << i;
        previous = id[i];
      }
      seen.last_real_id = __shfl_sync(kAllLanes, static_cast<int>(bound - 1), kWarpSize - 1);
      s_starts[word * 4 + lane] = starts, s_real[word * 4 + lane] = ~padding;
      const unsigned marked = __ballot_sync(kAllLanes, starts != 0);
      if (marked) {
        if (seen.first_word < 0) seen.first_word = word + lowest_bit(marked) / 4;
        seen.last_word = word + highest_bit(marked) / 4;
      }
    }
    seen.lowest_real_id = static_cast<int>(__reduce_min_sync(kAllLanes, lowest_id));
    seen.increases = !__any_sync(kAllLanes, falls);
    return seen;
  }

  // The start of a run behind the token, or the end of the row.
  __device__ int next_start(unsigned token) const {
    int word = token / kWarpSize;
    unsigned starts = starts_[word] & bits_above(token % kWarpSize);
    if (!starts) {
      word = word_after_[word];
      if (word == kNoWord) return length_;
      starts = starts_[word];
    }
    return word * kWarpSize + lowest_bit(starts);
  }

  // Fills in word_before_ of the warp's words: the nearest one with a bit in `bits`, given that outside its stretch.
  __device__ __forceinline__ void link_words_before(const unsigned* bits, int before) {
    const int lane = lane_of_thread();
#pragma unroll 1
    for (int base = first_word_; base < last_word_; base += kWarpSize) {
      const int word = base + lane;
      const unsigned marked = __ballot_sync(kAllLanes, word < last_word_ && bits[word]);
      const unsigned below = marked & bits_below(lane);
      if (word < last_word_) word_before_[word] = below ? base + highest_bit(below) : before;
      if (marked) before = base + highest_bit(marked);
    }
  }

  // Likewise word_before_ and word_after_, of the starts of runs.
  __device__ void link_words(int before, int after) {
    const int lane = lane_of_thread();
    link_words_before(starts_, before);
#pragma unroll 1
    for (int base = first_word_ + (last_word_ - first_word_ - 1) / kWarpSize * kWarpSize; base >= first_word_;
         base -= kWarpSize) {
      const int word = base + lane;
      const unsigned marked = __ballot_sync(kAllLanes, word < last_word_ && starts_[word]);
      const unsigned above = marked & bits_above(lane);
      if (word < last_word_) word_after_[word] = above ? base + lowest_bit(above) : after;
      if (marked) after = base + lowest_bit(marked);
    }
  }

  unsigned *starts_, *real_;             // a bit a token: a run starts here; it is not padding (a run kept starts here)
  uint16_t *word_before_, *word_after_;  // of each word, the nearest others that hold a start (kept), or kNoWord
  int length_;
  int first_word_, last_word_;  // of this warp
};

}  // namespace selfattn::cuda
