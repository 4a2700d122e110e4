// Tiles of keys, and the blocks of queries that they meet.
#pragma once
#include "config.h"
#include "flash/tile/key_blocks.cuh"
#include "flash/tile/row_segments.cuh"
#include "params.cuh"

namespace selfattn::cuda::sm80 {

struct KeyTile {
  int index, batch, kv_head;
  RowSegments segments;
  Interval blocks;  // of queries, in reach of its keys
};

template <class Config>
__device__ __forceinline__ KeyTile describe_key_tile(const BackwardKernelParams& p) {
  const AttentionShape& shape = p.call.shape;
  const TilePlace place = find_tile(p.of_keys, blockIdx.x);
  const int tiles = p.of_keys.tiles_per_head, batch = p.first_batch + place.head / shape.num_kv_heads;
  // Under a causal limit the first keys are seen by the most queries.
  KeyTile tile{place.rank, batch, place.head % shape.num_kv_heads, segments_of_row(p.call.segments, batch), {}};
  if (p.call.segments.mode) {
    constexpr int kTiles = Config::kKeyBlock / Config::kTileKey;  // of a tile of the tables
    tile.index = p.call.segments.order[batch * (tiles / kTiles) + place.rank / kTiles] * kTiles + place.rank % kTiles;
  }
  if (tile.index * Config::kTileKey >= shape.key_length) return tile;  // the end of a block of the tables
  const int first = tile.index * Config::kTileKey, last = min(first + Config::kTileKey, shape.key_length) - 1;
  const bool has_runs = tile.segments.has_runs;
  tile.blocks = blocks_of(
      {visible_queries(p.call, batch, has_runs, first).begin, visible_queries(p.call, batch, has_runs, last).end},
      Config::kTileQuery);
  return tile;
}

struct QueryBlock {
  int index, head;  // head of the group
  bool by_ids;      // its pairs must be compared by id
};

// Whether a block of queries may share a segment with the tile, and whether both are in one.
template <class Config>
__device__ __forceinline__ void compare_ids(const SegmentTables& segments, const KeyTile& tile, int block, bool& meets,
                                            bool& is_uniform) {
  const SegmentBlock
      keys =
          segments
              .key_blocks[int64_t(tile.batch) * segments.key_tiles + tile.index * Config::kTileKey / Config::kKeyBlock],
      queries =
          segments.query_blocks[int64_t(tile.batch) * segments.query_tiles + block * Config::kTileQuery / kQueryBlock];
  meets = may_share_segment(queries, keys), is_uniform = is_one_segment(queries, keys);
}

// The blocks of all heads of a group, each head's from the last to the first, or upwards. By whole warps, as
// KeyBlockWalk.
class QueryBlockWalk {
 public:
  __device__ __forceinline__ QueryBlockWalk(const Interval& blocks, int heads, bool has_ids, bool is_upward = false)
      : blocks_(blocks), heads_(heads), has_ids_(has_ids), is_upward_(is_upward), of_head_(blocks) {}

  // test(index, meets, is_uniform) judges a block where there are ids.
  template <class Test>
  __device__ __forceinline__ bool find_next(QueryBlock& block, const Test& test) {
    if (!has_ids_) {
      if (next_ >= blocks_.end - blocks_.begin) next_ = 0, head_++;
      if (head_ >= heads_ || blocks_.end <= blocks_.begin) return false;
      block = {is_upward_ ? blocks_.begin + next_ : blocks_.end - 1 - next_, head_, false};
      next_++;
      return true;
    }
    const auto index_of = [&](int place) { return is_upward_ ? blocks_.begin + blocks_.end - 1 - place : place; };
    KeyBlock found;
    while (!of_head_.find_next(
        found, [&](int place, bool& meets, bool& is_uniform) { test(index_of(place), meets, is_uniform); })) {
      if (++head_ >= heads_) return false;
      of_head_ = KeyBlockWalk(blocks_);
    }
    block = {index_of(found.index), head_, found.by_ids};
    return true;
  }

 private:
  Interval blocks_;
  int heads_, head_ = 0, next_ = 0;
  bool has_ids_, is_upward_;
  KeyBlockWalk of_head_;
};

}  // namespace selfattn::cuda::sm80
