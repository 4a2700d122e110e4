// Which queries may see a key. Causal limit, window, length and (in rows of contiguous segments) the key's document are
// one interval of queries each, so together they are one interval, and both its ends never decrease from key to key.
#pragma once
#include "config.cuh"
#include "schedule.cuh"

namespace selfattn::cuda::sm90 {

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

// The keys [x, y) that the query may see; y may lie below x. Both ends never decrease from query to query, too.
__device__ __forceinline__ int2 visible_keys_by_window(const BackwardParams& p, int query) {
  const int position = query + p.shape.key_length - p.shape.query_length;
  return {max(0, position - p.window.left), min(p.shape.key_length, position + p.window.right + 1)};
}

__device__ __forceinline__ int2 visible_keys(const BackwardParams& p, int batch, bool is_contiguous, int query) {
  int2 keys = visible_keys_by_window(p, query);
  if (is_contiguous) {
    const int64_t at = int64_t(batch) * p.segments.pitch_query + query;
    keys.x = max(keys.x, p.segments.run_begin[at]), keys.y = min(keys.y, p.segments.run_end[at]);
  }
  return keys;
}

// The query tiles [x, y) that key tile `tile` meets, by the intervals alone.
template <class Config>
__device__ __forceinline__ int2 query_tiles_of(const BackwardParams& p, int batch, bool is_contiguous, int tile) {
  const int first = tile * Config::kTileKv, last = min(first + Config::kTileKv, p.shape.key_length) - 1;
  const int begin = visible_queries(p, batch, is_contiguous, first).x,
            end = visible_queries(p, batch, is_contiguous, last).y;
  return begin < end ? int2{begin / Config::kTileQ, (end + Config::kTileQ - 1) / Config::kTileQ} : int2{0, 0};
}

// Whether kernels of `form` have work. Called by whole warps, behind the wait for the kernel ahead.
__device__ __forceinline__ bool has_work(const BackwardParams& p, const BackwardSchedule& schedule, BackwardForm form) {
  if (schedule.form != BackwardForm::kEither) return true;
  long long computed_blocks = 0;
  for (int b = threadIdx.x % 32; b < schedule.batches_counted; b += 32)
    computed_blocks += p.segments.computed_blocks[b];
#pragma unroll
  for (int distance = 16; distance; distance /= 2) computed_blocks += __shfl_xor_sync(~0u, computed_blocks, distance);
  return (computed_blocks <= schedule.max_blocks_of_two_pass) == (form == BackwardForm::kTwoPass);
}

// What is known of the segments in a query tile: one block of the tables, or two together.
template <int kTileQ>
__device__ __forceinline__ SegmentBlock query_block(const BackwardParams& p, const BackwardSchedule& schedule,
                                                    int batch, int tile) {
  constexpr int kBlocks = kTileQ / kQueryBlock;
  const SegmentBlock* g_blocks = p.segments.query_blocks + int64_t(batch) * schedule.query_blocks;
  SegmentBlock block = g_blocks[tile * kBlocks];
  if (kBlocks == 2 && tile * kBlocks + 1 < schedule.query_blocks) {
    const SegmentBlock second = g_blocks[tile * kBlocks + 1];
    block.min_id = min(block.min_id, second.min_id), block.max_id = max(block.max_id, second.max_id);
    block.signature |= second.signature;
  }
  return block;
}

// Whether two blocks of tokens may share a segment. May err on the side of yes.
__device__ __forceinline__ bool may_share_segment(const SegmentBlock& a, const SegmentBlock& b) {
  return a.min_id <= b.max_id && b.min_id <= a.max_id && (a.signature & b.signature) != 0;
}

}  // namespace selfattn::cuda::sm90
