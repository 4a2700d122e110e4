// Which queries may see a key. Causal limit, window, length and (in rows of contiguous segments) the key's document are
// one interval of queries each, so together they are one interval, and both its ends never decrease from key to key.
#pragma once
#include <climits>

#include "config.cuh"
#include "flash/tile/key_blocks.cuh"
#include "flash/tile/window.h"
#include "schedule.cuh"

namespace selfattn::cuda::sm90 {

// How the segments of a batch's row limit it: by runs, by ids, or not at all.
struct RowSegments {
  bool has_runs, has_ids;
};

__device__ __forceinline__ RowSegments segments_of_row(const SegmentTables& segments, int batch) {
  const bool has_segments = segments.mode != nullptr;
  const bool has_ids = has_segments && segments.mode[batch] == kGeneral;
  return {has_segments && !has_ids, has_ids};
}

__device__ __forceinline__ Interval run_of(const SegmentTables& segments, int batch, int token) {
  const int64_t at = int64_t(batch) * segments.pitch_query + token;
  return {segments.run_begin[at], segments.run_end[at]};
}

// The queries that see the key, ids aside.
__device__ __forceinline__ Interval visible_queries(const BackwardParams& p, int batch, bool has_runs, int key) {
  Interval queries = queries_of_key(p.window, key, p.shape.key_length - p.shape.query_length, p.shape.query_length);
  if (has_runs) queries = queries & run_of(p.segments, batch, key);
  return queries;
}

// The keys that the query may see by its window alone, and by its run, too.
__device__ __forceinline__ Interval visible_keys_by_window(const BackwardParams& p, int query) {
  return keys_of_query(p.window, query, p.shape.key_length - p.shape.query_length, p.shape.key_length);
}

__device__ __forceinline__ Interval visible_keys(const BackwardParams& p, int batch, bool has_runs, int query) {
  Interval keys = visible_keys_by_window(p, query);
  if (has_runs) keys = keys & run_of(p.segments, batch, query);
  return keys;
}

// The query tiles that key tile `tile` meets, ids aside.
template <class Config>
__device__ __forceinline__ Interval query_tiles_of(const BackwardParams& p, int batch, bool has_runs, int tile) {
  const int first = tile * Config::kTileKv, last = min(first + Config::kTileKv, p.shape.key_length) - 1;
  const int begin = visible_queries(p, batch, has_runs, first).begin,
            end = visible_queries(p, batch, has_runs, last).end;
  return begin < end ? Interval{begin / Config::kTileQ, (end + Config::kTileQ - 1) / Config::kTileQ} : Interval{0, 0};
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
    const bool has_padding = (block.min_id > block.max_id) != (second.min_id > second.max_id);  // all of one
    block.min_id = min(block.min_id, second.min_id), block.max_id = max(block.max_id, second.max_id);
    block.signature |= second.signature;
    // As in the preparation: one id and padding are made to look like two ids, for uniform means unmasked.
    if (has_padding && block.min_id == block.max_id) block.max_id < INT_MAX ? block.max_id++ : block.min_id--;
  }
  return block;
}

}  // namespace selfattn::cuda::sm90
