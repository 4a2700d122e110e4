// Which keys a query may see by the causal limit, the window and the length of the row: an interval whose ends never
// decrease from query to query.
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

}  // namespace selfattn::cuda
