// The key blocks that a query tile visits, from right to left, as the producer warp finds them.
#pragma once
#include <cuda_runtime.h>

#include "flash/segments/tables.h"
#include "window.h"

namespace selfattn::cuda {

struct KeyBlock {
  int index;
  bool is_last;  // of the tile
  bool by_ids;   // its pairs must be compared by id

  static constexpr int kLast = 1, kByIds = 2, kIndexShift = 2;
  __device__ __forceinline__ int encode() const {
    return index << kIndexShift | (is_last ? kLast : 0) | (by_ids ? kByIds : 0);
  }
  static __device__ __forceinline__ KeyBlock decode(int message) {
    return {message >> kIndexShift, (message & kLast) != 0, (message & kByIds) != 0};
  }
};

// Whether two blocks of tokens may share a segment. May err on the side of yes.
__device__ __forceinline__ bool may_share_segment(const SegmentBlock& a, const SegmentBlock& b) {
  return a.min_id <= b.max_id && b.min_id <= a.max_id && (a.signature & b.signature) != 0;
}

// Whether all tokens of both are in one segment, so that no pair need be compared.
__device__ __forceinline__ bool is_one_segment(const SegmentBlock& a, const SegmentBlock& b) {
  return a.min_id == a.max_id && b.min_id == b.max_id && a.min_id == b.min_id;
}

// The blocks of [first, end); with ids only those that may hold an id of the query tile. The whole warp walks together:
// each lane tests one of 32 candidates. A signature may claim a common id where there is none; that costs time, never
// correctness.
class KeyBlockWalk {
 public:
  // `always`, at least `first`, is visited whatever the test says (-1: no such block).
  __device__ KeyBlockWalk(int first, int end, int always) : first_(first), group_end_(end), always_(always) {}
  __device__ explicit KeyBlockWalk(const Interval& blocks) : KeyBlockWalk(blocks.begin, blocks.end, -1) {}

  // test(index, meets, is_uniform) judges one candidate.
  template <class Test>
  __device__ __forceinline__ bool find_next(KeyBlock& block, const Test& test) {
    while (!candidates_) {
      if (group_end_ <= first_) return false;
      const int index = group_end_ - 1 - static_cast<int>(threadIdx.x % kGroup);
      bool meets = index >= first_, is_uniform = true;
      if (meets) {
        test(index, meets, is_uniform);
        meets |= index == always_;
      }
      candidates_ = __ballot_sync(~0u, meets);
      uniform_ = __ballot_sync(~0u, is_uniform);
      group_end_ -= kGroup;
    }
    const int bit = __ffs(candidates_) - 1;
    candidates_ &= candidates_ - 1;
    block.index = group_end_ + kGroup - 1 - bit;
    block.by_ids = !(uniform_ >> bit & 1);
    return true;
  }

 private:
  static constexpr int kGroup = 32;
  int first_, group_end_, always_;
  unsigned candidates_ = 0, uniform_ = 0;
};

}  // namespace selfattn::cuda
