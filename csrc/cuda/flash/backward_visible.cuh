// Which queries may see a key. Causal limit, window, length and (in rows of contiguous segments) the key's document are
// one interval of queries each, so together they are one interval, and both its ends never decrease from key to key.
#pragma once
#include "backward.h"

namespace selfattn::cuda {

// The queries [x, y) that see the key; y may lie below x (none do).
__device__ __forceinline__ int2 visible_queries(const BackwardParams& p, int batch, bool is_contiguous, int key) {
  const int shift = p.shape.key_length - p.shape.query_length;
  int begin = max(0, key - p.window.right - shift), end = min(p.shape.query_length, key + p.window.left - shift + 1);
  if (is_contiguous) {
    const int64_t at = int64_t(batch) * p.segments.pitch_query + key;
    begin = max(begin, p.segments.run_begin[at]);
    end = min(end, p.segments.run_end[at]);
  }
  return {begin, end};
}

// The query tiles [x, y) that key tile `tile` meets, by the intervals alone.
template <class Config>
__device__ __forceinline__ int2 query_tiles_of(const BackwardParams& p, int batch, bool is_contiguous, int tile) {
  const int first = tile * Config::kTileKv, last = min(first + Config::kTileKv, p.shape.key_length) - 1;
  const int begin = visible_queries(p, batch, is_contiguous, first).x,
            end = visible_queries(p, batch, is_contiguous, last).y;
  return begin < end ? int2{begin / Config::kTileQ, (end + Config::kTileQ - 1) / Config::kTileQ} : int2{0, 0};
}

// Whether two blocks of tokens may share a segment. May err on the side of yes.
__device__ __forceinline__ bool may_share_segment(const SegmentBlock& a, const SegmentBlock& b) {
  return a.min_id <= b.max_id && b.min_id <= a.max_id && (a.signature & b.signature) != 0;
}

}  // namespace selfattn::cuda
