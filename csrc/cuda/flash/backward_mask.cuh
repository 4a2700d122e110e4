// Hides pairs of a block of S^T from the exponential. Rows are keys, columns queries, as accumulators hold them
// (wgmma.cuh).
#pragma once
#include "backward_config.cuh"
#include "backward_visible.cuh"

namespace selfattn::cuda {

// first_key: that of this lane's first row, the other is first_key + 8; first_query: that of its first column, whose id
// is the first of s_query_ids.
template <int kColumns>
__device__ __forceinline__ void hide_pairs(float (&scores)[kColumns / 2], const BackwardParams& p, int flags, int batch,
                                           int first_key, int first_query, const int* s_query_ids) {
  int first[2];
  unsigned count[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int key = first_key + 8 * r;
    const bool is_hidden = key >= p.shape.key_length || flags & kAllHidden;
    const int2 visible = is_hidden ? int2{0, 0} : visible_queries(p, batch, flags & kHiddenByRuns, key);
    first[r] = visible.x - first_query, count[r] = max(visible.y - visible.x, 0);
  }
#pragma unroll
  for (int i = 0; i < kColumns / 2; i++) {
    if (unsigned(i / 4 * 8 + i % 2 - first[i / 2 % 2]) >= count[i / 2 % 2]) scores[i] = -INFINITY;
  }
  if (flags & kHiddenByIds) {
    const int* g_key_ids = p.segments.key_ids + int64_t(batch) * p.segments.pitch_key + first_key;
    const int key_id[2] = {g_key_ids[0], g_key_ids[8]};
#pragma unroll
    for (int i = 0; i < kColumns / 8; i++) {
      const int2 query_id = *reinterpret_cast<const int2*>(s_query_ids + i * 8);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        if (query_id.x != key_id[r]) scores[4 * i + 2 * r] = -INFINITY;
        if (query_id.y != key_id[r]) scores[4 * i + 2 * r + 1] = -INFINITY;
      }
    }
  }
}

}  // namespace selfattn::cuda
