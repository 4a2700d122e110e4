// How the segments of a batch's row limit the pairs: by runs of neighbouring tokens, by ids, or not at all. Causal
// limit, window, length and run are an interval each, so together they are one, whose ends never decrease from token to
// token.
#pragma once
#include <climits>

#include "flash/segments/tables.h"
#include "window.h"

namespace selfattn::cuda {

struct RowSegments {
  bool has_runs, has_ids;
};

__device__ __forceinline__ RowSegments segments_of_row(const SegmentTables& segments, int batch) {
  const bool has_segments = segments.mode != nullptr;
  const bool has_ids = has_segments && segments.mode[batch] == kGeneral;
  return {has_segments && !has_ids, has_ids};
}

// What the other side has of the token's segment, in a row with runs.
__device__ __forceinline__ Interval keys_of_segment(const SegmentTables& segments, int batch, int query) {
  const int64_t place = int64_t(batch) * segments.pitch_query + query;
  return {segments.key_begin[place], segments.key_end[place]};
}
__device__ __forceinline__ Interval queries_of_segment(const SegmentTables& segments, int batch, int key) {
  const int64_t place = int64_t(batch) * segments.pitch_key + key;
  return {segments.query_begin[place], segments.query_end[place]};
}

// The keys that a query may see by its window alone, and by its segment, too, where that is an interval.
__device__ __forceinline__ Interval visible_keys_by_window(const BackwardParams& p, int query) {
  return keys_of_query(p.window, query, p.shape.key_length - p.shape.query_length, p.shape.key_length);
}
__device__ __forceinline__ Interval visible_keys(const BackwardParams& p, int batch, bool has_runs, int query) {
  Interval keys = visible_keys_by_window(p, query);
  if (has_runs) keys = keys & keys_of_segment(p.segments, batch, query);
  return keys;
}

// The queries that may see a key, ids aside.
__device__ __forceinline__ Interval visible_queries(const BackwardParams& p, int batch, bool has_runs, int key) {
  Interval queries = queries_of_key(p.window, key, p.shape.key_length - p.shape.query_length, p.shape.query_length);
  if (has_runs) queries = queries & queries_of_segment(p.segments, batch, key);
  return queries;
}

// The blocks of `size` tokens that an interval meets.
__device__ __forceinline__ Interval blocks_of(const Interval& tokens, int size) {
  return {tokens.begin / size, tokens.end > tokens.begin ? (tokens.end - 1) / size + 1 : 0};
}

// What is known of the segments in a tile of one or two blocks of the tables, block `first` of `blocks` and the next.
template <int kBlocks>
__device__ __forceinline__ SegmentBlock tile_of_blocks(const SegmentBlock* g_row, int first, int blocks) {
  static_assert(kBlocks == 1 || kBlocks == 2);
  SegmentBlock block = g_row[first];
  if (kBlocks == 2 && first + 1 < blocks) {
    const SegmentBlock second = g_row[first + 1];
    const bool has_padding = (block.min_id > block.max_id) != (second.min_id > second.max_id);  // all of one
    block.min_id = min(block.min_id, second.min_id), block.max_id = max(block.max_id, second.max_id);
    block.signature |= second.signature;
    // As in the preparation: one id and padding are made to look like two ids, for uniform means unmasked.
    if (has_padding && block.min_id == block.max_id) block.max_id < INT_MAX ? block.max_id++ : block.min_id--;
  }
  return block;
}

// Of 16 or 32 rows that a warp has: the columns that some row meets, and those that all meet, ids aside. Both ends of
// the rows' intervals never decrease, so the first and the last row tell.
struct WarpReach {
  Interval by_some, by_all;

  __device__ __forceinline__ WarpReach(const Interval& first, const Interval& last)
      : by_some{first.begin, last.end}, by_all{last.begin, first.end} {}
  __device__ __forceinline__ bool meets(int first_column, int columns) const {
    return first_column < by_some.end && first_column + columns > by_some.begin;
  }
  __device__ __forceinline__ bool covers(int first_column, int columns) const {
    return by_all.begin <= first_column && first_column + columns <= by_all.end;
  }
};

}  // namespace selfattn::cuda
