// Which keys a query may see by the causal limit, the window and the length of the row, and which queries see a key:
// intervals whose ends never decrease from token to token.
#pragma once
#include "flash/params.h"

namespace selfattn::cuda {

// Tokens begin .. end - 1; none where end <= begin.
struct Interval {
  int begin, end;

  __device__ __forceinline__ Interval operator&(const Interval& other) const {
    return {::max(begin, other.begin), ::min(end, other.end)};
  }
};

// offset = key_length - query_length: query i stands at key position i + offset.
__device__ __forceinline__ Interval keys_of_query(const AttentionWindow& window, int query, int offset,
                                                  int key_length) {
  return {::max(query + offset - window.left, 0), ::min(query + offset + window.right + 1, key_length)};
}

__device__ __forceinline__ Interval queries_of_key(const AttentionWindow& window, int key, int offset,
                                                   int query_length) {
  return {::max(key - window.right - offset, 0), ::min(key + window.left - offset + 1, query_length)};
}

// Which slots in use of a row of a KV cache a query may see from a position of any size: at a negative one, none.
__host__ __device__ __forceinline__ Interval slots_of_query(const AttentionWindow& window, int position, int slots) {
  if (position < 0) return {0, 0};
  // Sides and lengths are 2^30 at most: what is seen from far behind them is seen from here, and no sum overflows.
  constexpr int kFarthest = 3 << 29;
  position = ::min(position, kFarthest);
  const unsigned end = static_cast<unsigned>(position) + static_cast<unsigned>(window.right) + 1u;
  return {::min(::max(position - window.left, 0), slots), static_cast<int>(::min(end, static_cast<unsigned>(slots)))};
}

}  // namespace selfattn::cuda
