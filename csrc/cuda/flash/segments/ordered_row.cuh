// A batch row whose tokens stand in order, so that a window of positions is an interval of the other side's tokens:
// found by bisection, without shared memory, in rows of any length.
#pragma once
#include <cassert>
#include <climits>
#include <cstdint>

#include "row_ids.cuh"

namespace selfattn::cuda {

template <class Id>
struct OrderedRow : RowIds<Id, 2> {
  static constexpr bool kMayBeGeneral = false;

  __device__ OrderedRow(const SegmentProblem& p, int64_t b, unsigned*, int, int) : RowIds<Id, 2>{p, b} {}

  using RowIds<Id, 2>::p, RowIds<Id, 2>::b, RowIds<Id, 2>::length, RowIds<Id, 2>::ids;

  // Called by the thread blocks of the row, each for a share of the tokens, to see that they are in order.
  __device__ __forceinline__ bool find_intervals() const {
    const int first = blockIdx.y * blockDim.x + threadIdx.x, step = gridDim.y * blockDim.x;
#pragma unroll 1
    for (int side = 0; side < 2; side++) {
#pragma unroll 1
      for (int token = first; token + 1 < length(side); token += step)
        assert((is_padding(side, token + 1) || place(side, token) <= place(side, token + 1)) &&
               "tokens with positions must be in order");
    }
    return true;
  }

  // The other side's tokens in the window of a token. Where there is none, empty, between those of the tokens around
  // it.
  __device__ __forceinline__ Interval interval(int side, int token) const {
    const int other = 1 - side;
    const int64_t position = position_of(side, token);
    const int id = ids(side)[token];
    if (id < 0) {  // behind all others: tiles that hold some of both meet no padding of the other side for it
      const int end = count_ahead_of(other, kFirstPadding);
      return {end, end};
    }
    const SegmentPositions& window = p.positions;
    const int64_t before = side == kQuerySide ? window.left : window.right,
                  after = side == kQuerySide ? window.right : window.left;
    const int64_t first = before < 0 ? INT_MIN : max(position - before, int64_t(INT_MIN)),
                  last = after < 0 ? INT_MAX : min(position + after, int64_t(INT_MAX));
    return {count_ahead_of(other, place(id, first)), count_ahead_of(other, place(id, last) + 1)};
  }

 private:
  __device__ __forceinline__ int position_of(int side, int token) const {
    const int* g_positions = side == kQuerySide ? p.positions.of_queries : p.positions.of_keys;
    return g_positions[b * length(side) + token];
  }
  __device__ __forceinline__ bool is_padding(int side, int token) const { return ids(side)[token] < 0; }

  static constexpr uint64_t kFirstPadding = uint64_t(~0u) << 32;

  // By id, all padding behind the others, then by position.
  static __device__ __forceinline__ uint64_t place(int id, int64_t position) {
    return uint64_t(static_cast<unsigned>(max(id, -1))) << 32 | static_cast<unsigned>(position - INT_MIN);
  }
  __device__ __forceinline__ uint64_t place(int side, int token) const {
    return place(ids(side)[token], static_cast<int64_t>(position_of(side, token)));
  }

  __device__ __forceinline__ int count_ahead_of(int side, uint64_t limit) const {
    int begin = 0, end = length(side);
#pragma unroll 1
    while (begin < end) {
      const int middle = (begin + end) / 2;
      if (place(side, middle) < limit)
        begin = middle + 1;
      else
        end = middle;
    }
    return begin;
  }
};

}  // namespace selfattn::cuda
