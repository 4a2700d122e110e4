// How the segments of a batch's row limit the pairs: by runs of neighbouring tokens, by ids, or not at all.
#pragma once
#include "flash/segments/tables.h"
#include "flash/tile/key_blocks.cuh"
#include "flash/tile/window.h"

namespace selfattn::cuda::sm80 {

struct RowSegments {
  bool has_runs, has_ids;
};

__device__ __forceinline__ RowSegments segments_of_row(const SegmentTables& segments, int batch) {
  const bool has_segments = segments.mode != nullptr;
  const bool has_ids = has_segments && segments.mode[batch] == kGeneral;
  return {has_segments && !has_ids, has_ids};
}

__device__ __forceinline__ Interval run_of(const SegmentTables& segments, int batch, int token) {
  const int64_t place = int64_t(batch) * segments.pitch_query + token;
  return {segments.run_begin[place], segments.run_end[place]};
}

// The keys that a query may see, and the queries that may see a key, ids aside.
__device__ __forceinline__ Interval visible_keys(const BackwardParams& p, int batch, bool has_runs, int query) {
  const Interval keys = keys_of_query(p.window, query, p.shape.key_length - p.shape.query_length, p.shape.key_length);
  return has_runs ? keys & run_of(p.segments, batch, query) : keys;
}
__device__ __forceinline__ Interval visible_queries(const BackwardParams& p, int batch, bool has_runs, int key) {
  const Interval queries =
      queries_of_key(p.window, key, p.shape.key_length - p.shape.query_length, p.shape.query_length);
  return has_runs ? queries & run_of(p.segments, batch, key) : queries;
}

// The blocks of `size` tokens that an interval meets.
__device__ __forceinline__ Interval blocks_of(const Interval& tokens, int size) {
  return {tokens.begin / size, tokens.end > tokens.begin ? (tokens.end - 1) / size + 1 : 0};
}

// What both blocks hold together. One that is all padding leaves none of one id alone.
__device__ __forceinline__ SegmentBlock unite(const SegmentBlock& a, const SegmentBlock& b) {
  SegmentBlock both = {min(a.min_id, b.min_id), max(a.max_id, b.max_id), a.signature | b.signature};
  const bool has_padding = (a.signature == 0) != (b.signature == 0);
  if (has_padding && both.min_id == both.max_id) both.max_id < 0x7fffffff ? both.max_id++ : both.min_id--;
  return both;
}

// A tile of one or two blocks, the first of which is `first` of `blocks`.
template <int kBlocks>
__device__ __forceinline__ SegmentBlock tile_of_blocks(const SegmentBlock* g_row, int first, int blocks) {
  static_assert(kBlocks == 1 || kBlocks == 2);
  const SegmentBlock block = g_row[first];
  return kBlocks == 2 && first + 1 < blocks ? unite(block, g_row[first + 1]) : block;
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

}  // namespace selfattn::cuda::sm80
