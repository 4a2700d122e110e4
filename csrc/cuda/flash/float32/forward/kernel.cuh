// The float32 forward kernel: a thread block a query tile; each warp has 16, 32 or 64 rows of it to itself, and all
// share the blocks of keys and values that they load.
//
//   wait for K | start V | S = Q K^T, P | wait for V | start the next K | O += P V
//
// So V comes while S is multiplied, and K while O is. Tiles whose output is not finite are computed once more
// (exceptional.cuh).
#pragma once
#include "config.h"
#include "flash/float32/exceptional.cuh"
#include "flash/float32/softcap.cuh"
#include "flash/tile/key_blocks.cuh"
#include "flash/tile/mask.cuh"
#include "flash/tile/row_segments.cuh"
#include "flash/tile/tile_order.cuh"
#include "softmax.cuh"

namespace selfattn::cuda::float32 {

struct ForwardKernelParams {
  ForwardParams call;
  TileSchedule schedule;
};

constexpr int kNoSegments = -1;  // beside the values of SegmentMode

struct QueryTile {
  int index, batch, head, head_of_all;
  int mode;
  Interval blocks;  // of keys, in reach of its rows
};

// The keys that a query may see, ids aside.
__device__ __forceinline__ Interval keys_of_row(const ForwardParams& call, const QueryTile& tile, int row) {
  const AttentionShape& shape = call.shape;
  const Interval window = keys_of_query(call.window, row, shape.key_length - shape.query_length, shape.key_length);
  if (tile.mode != kContiguous) return window;
  const int64_t place = int64_t(tile.batch) * call.segments.pitch_query + row;
  return window & Interval{call.segments.key_begin[place], call.segments.key_end[place]};
}

template <class Config>
__device__ __forceinline__ QueryTile describe_tile(const ForwardKernelParams& p) {
  const AttentionShape& shape = p.call.shape;
  const SegmentTables& segments = p.call.segments;
  const TilePlace place = find_tile(p.schedule, blockIdx.x);
  const int tiles = p.schedule.tiles_per_head;
  QueryTile tile{place.rank, place.head / shape.num_heads, place.head % shape.num_heads, place.head, kNoSegments, {}};
  if (segments.mode) {
    tile.mode = segments.mode[tile.batch];
    tile.index = segments.order[tile.batch * tiles + place.rank];
  } else if (p.call.window.right < AttentionWindow::kUnbounded) {
    tile.index = tiles - 1 - place.rank;  // the last see the most keys
  }
  const int first = tile.index * Config::kTileQuery, last = min(first + Config::kTileQuery, shape.query_length) - 1;
  const Interval keys{keys_of_row(p.call, tile, first).begin, keys_of_row(p.call, tile, last).end};
  tile.blocks = blocks_of(keys, Config::kTileKey);
  return tile;
}

// Writes out and lse. Returns whether a row of this warp must be computed with more care.
template <class Config, bool kIsRepair>
__device__ __forceinline__ bool attend(const ForwardKernelParams& p, const QueryTile& tile,
                                       typename Config::SharedStorage& s) {
  using Query = typename Config::Query;
  using Key = typename Config::Key;
  using Value = typename Config::Value;
  constexpr Precision kPrecision = Config::kPrecision;
  constexpr int kTileKey = Config::kTileKey, kGroups = Config::kRowGroups, kThreads = Config::kThreads;
  const ForwardParams& call = p.call;
  const AttentionShape& shape = call.shape;
  const SegmentTables& segments = call.segments;
  const int lane = threadIdx.x % kWarpSize, warp_row = threadIdx.x / kWarpSize * Config::kWarpRows;
  const int first_row = tile.index * Config::kTileQuery, kv_head = tile.head / (shape.num_heads / shape.num_kv_heads);
  const LogitScale scale = make_logit_scale(call.scale, call.softcap);

  const auto load_key = [&](int block) {
    Key::template load<kThreads>(ptx::shared_address(s.k), head_of(call.k, tile.batch, kv_head), call.k.stride_token,
                                 block * kTileKey, shape.key_length, shape.dim_qk);
  };
  const auto load_value = [&](int block) {
    Value::template load<kThreads>(ptx::shared_address(s.v), head_of(call.v, tile.batch, kv_head), call.v.stride_token,
                                   block * kTileKey, shape.key_length, shape.dim_v);
  };
  const auto keys_of = [&](int row_in_tile) {
    return keys_of_row(call, tile, min(first_row + row_in_tile, shape.query_length - 1));
  };
  const auto test = [&](int index, bool& meets, bool& is_uniform) {
    if (tile.mode != kGeneral) return;
    const SegmentBlock queries = segments.query_blocks[int64_t(tile.batch) * segments.query_tiles + tile.index],
                       keys = segments.key_blocks[int64_t(tile.batch) * segments.key_tiles + index];
    meets = may_share_segment(queries, keys), is_uniform = is_one_segment(queries, keys);
  };
  KeyBlockWalk walk(tile.blocks.begin, tile.blocks.end, -1);
  KeyBlock block{0, false, false}, next{0, false, false};
  bool has_block = walk.find_next(block, test);

  if constexpr (kIsRepair) __syncthreads();  // the first pass has read its last V
  Query::template load<kThreads>(ptx::shared_address(s.q), head_of(call.q, tile.batch, tile.head), call.q.stride_token,
                                 first_row, shape.query_length, shape.dim_qk);
  if (has_block) load_key(block.index);
  ptx::commit_copies();
  ptx::wait_for_copies<0>();
  Query::template prepare_left<kPrecision, kThreads>(s.q);
  __syncthreads();  // Q is there, and K

  const uint32_t query_place = Query::left_place(ptx::shared_address(s.q), warp_row);
  constexpr int kQueryPairs = Config::kHoldsQuery ? Config::kDim / kPairColumns : 1;
  LeftRows<kPrecision, kGroups> query[kQueryPairs];
  if constexpr (Config::kHoldsQuery)
#pragma unroll
    for (int pair = 0; pair < kQueryPairs; pair++) query[pair].template load<Query>(query_place, pair);

  // Keys that some row of the warp may see, and that all may see, by intervals: both ends never decrease.
  const Interval first = keys_of(warp_row), last = keys_of(warp_row + Config::kWarpRows - 1);
  const Interval reach{first.begin, last.end}, shared{last.begin, first.end};
  RowSoftmax softmax[kGroups];
  float out[kGroups][Config::kDim / 2];
  clear(out);
  float spoilt = 0.f;  // NaN where a score was not finite

#pragma unroll 1
  while (has_block) {
    const bool has_next = walk.find_next(next, test);
    const int first_key = block.index * kTileKey;
    const bool is_needed = first_key < reach.end && first_key + kTileKey > reach.begin;
    ptx::wait_for_copies<0>();
    __syncthreads();  // K is there, and V of the block before has been read
    load_value(block.index);
    ptx::commit_copies();

    float scores[kGroups][kTileKey / 2];
    if (is_needed) {
      const uint32_t key_place = Key::right_place(ptx::shared_address(s.k));
      if constexpr (Config::kHoldsQuery) {
        clear(scores);
#pragma unroll
        for (int pair = 0; pair < kQueryPairs; pair++)
          multiply_pair<kPrecision, Key, false>(scores, query[pair], key_place, pair);
      } else {
        multiply_rows<kPrecision, Query, Key, false>(scores, query_place, key_place);
      }
      if constexpr (kIsRepair) {
        correct_products<Query, Key>(scores, s.q, warp_row, s.k, 0);
      } else {
        // Of an infinite score not even the sign is right: tensor cores do not take what overflows for infinite before
        // the end of a sum, and so add it to an infinity of the smaller terms.
#pragma unroll
        for (int g = 0; g < kGroups; g++)
#pragma unroll
          for (int i = 0; i < kTileKey / 2; i++) spoilt = fmaf(scores[g][i], 0.f, spoilt);
      }
      cap_scores(scores, scale);
      const bool is_cut = first_key + kTileKey > shared.end || first_key < shared.begin;
      if (is_cut || block.by_ids) {
        const int first_column = first_key + 2 * (lane % 4);
#pragma unroll
        for (int g = 0; g < kGroups; g++) {
          const int row = warp_row + kProductRows * g + lane / 4;
          if (is_cut) {
            const Interval keys[2] = {keys_of(row), keys_of(row + 8)};
            mask_by_intervals<true>(scores[g], keys, first_column);
          }
          if (block.by_ids) {
            const int* g_ids = segments.query_ids + int64_t(tile.batch) * segments.pitch_query + first_row + row;
            const int ids[2] = {g_ids[0], g_ids[8]};
            mask_by_ids(scores[g], ids, segments.key_ids + int64_t(tile.batch) * segments.pitch_key + first_column);
          }
        }
      }
#pragma unroll
      for (int g = 0; g < kGroups; g++) {
        float correction[2];
        softmax[g].take(scores[g], scale.of_scores * kLog2E, correction);
        if (!__all_sync(~0u, correction[0] == 1.f && correction[1] == 1.f))
#pragma unroll
          for (int i = 0; i < Config::kDim / 2; i++) out[g][i] *= correction[i / 2 % 2];
      }
    }

    ptx::wait_for_copies<0>();
    __syncthreads();  // V is there, and K has been read
    if (has_next) load_key(next.index);
    ptx::commit_copies();
    if constexpr (kIsRepair) {
      if (is_needed) add_exceptional<Value>(out, scores, s.v, 0);
      __syncthreads();  // all have read V as it came
      clear_exceptional<Value, kThreads>(s.v);
      __syncthreads();
    }
    if (is_needed) accumulate<kPrecision, Value>(out, scores, s.v);
    block = next, has_block = has_next;
  }

  bool is_spoilt = spoilt != spoilt;
#pragma unroll
  for (int g = 0; g < kGroups; g++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float max = softmax[g].max[r], sum = softmax[g].total(r);
      const RowEnd end = call.sinks ? end_row_with_sink(max, sum, scale.of_scores, call.sinks[tile.head])
                                    : end_row(max, sum, scale.of_scores);
      const int row = first_row + warp_row + kProductRows * g + 8 * r + lane / 4;
      if (row >= shape.query_length) continue;
      is_spoilt = is_spoilt || !is_row_finite(out[g], r) || !(sum == sum);
      if (lane % 4 == 0) call.lse[int64_t(tile.head_of_all) * shape.query_length + row] = end.lse;
      store_row<Config::kLayout>(out[g], r, end.factor,
                                 head_of(call.out, tile.batch, tile.head) + row * call.out.stride_token, shape.dim_v);
    }
  return is_spoilt;
}

// Apart from the first pass, whose registers it must not take.
template <class Config>
__device__ __noinline__ void repair(const ForwardKernelParams& p, const QueryTile& tile,
                                    typename Config::SharedStorage& s) {
  attend<Config, true>(p, tile, s);
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksAtOnce)
    flash_attention_forward_kernel(const __grid_constant__ ForwardKernelParams p) {
  extern __shared__ __align__(128) unsigned char s_memory[];
  auto& s = *reinterpret_cast<typename Config::SharedStorage*>(s_memory);
  const QueryTile tile = describe_tile<Config>(p);
  if (__syncthreads_or(attend<Config, false>(p, tile, s))) repair<Config>(p, tile, s);
}

}  // namespace selfattn::cuda::float32
