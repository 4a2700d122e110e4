// Sets the scores of masked pairs of a block to -inf. A lane holds two rows of the block (8 apart) as accumulators
// do (wgmma.cuh); rows are keys and columns queries, or the other way round.
#pragma once
#include "config.cuh"
#include "flash/tile/mask.cuh"
#include "intervals.cuh"

namespace selfattn::cuda::sm90 {

// The columns that the lane's two rows may meet, by the intervals alone: count[r] of them from first[r] on.
struct RowIntervals {
  int first[2];
  unsigned count[2];

  __device__ __forceinline__ void set(int r, const Interval& interval) {
    first[r] = interval.begin, count[r] = max(interval.end - interval.begin, 0);
  }
};

// first_column: number of this lane's first column.
template <int kColumns>
__device__ __forceinline__ void mask_by_intervals(float (&scores)[kColumns / 2], const RowIntervals& rows,
                                                  int first_column) {
  const int first[2] = {rows.first[0] - first_column, rows.first[1] - first_column};
#pragma unroll
  for (int i = 0; i < kColumns / 2; i++) {
    if (unsigned(i / 4 * 8 + i % 2 - first[i / 2 % 2]) >= rows.count[i / 2 % 2]) scores[i] = -INFINITY;
  }
}

// The queries that see the lane's keys first_key and first_key + 8. `flags` of any block of the tile.
__device__ __forceinline__ RowIntervals query_intervals(const BackwardParams& p, int flags, int batch, int first_key) {
  RowIntervals rows;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int key = first_key + 8 * r;
    const bool sees_nothing = key >= p.shape.key_length || flags & kAllMasked;
    rows.set(r, sees_nothing ? Interval{0, 0} : visible_queries(p, batch, flags & kMaskedByRuns, key));
  }
  return rows;
}

// Of a block whose rows are keys. first_key: that of this lane's first row; first_query: that of its first column,
// whose id is the first of s_query_ids.
template <int kColumns>
__device__ __forceinline__ void mask_scores(float (&scores)[kColumns / 2], const BackwardParams& p,
                                            const RowIntervals& rows, int flags, int batch, int first_key,
                                            int first_query, const int* s_query_ids) {
  mask_by_intervals<kColumns>(scores, rows, first_query);
  if (flags & kMaskedByIds) {
    const int* g_key_ids = p.segments.key_ids + int64_t(batch) * p.segments.pitch_key + first_key;
    const int key_id[2] = {g_key_ids[0], g_key_ids[8]};
    mask_by_ids(scores, key_id, s_query_ids);
  }
}

}  // namespace selfattn::cuda::sm90
