// dQ: a thread block a query tile; each warp has 16 or 32 rows of it, and all share the blocks of keys and values that
// they load.
//
//   wait for V | start K | dP = dO V^T | wait for K | start the next V | S = Q K^T, P, dS | dQ += dS K
//
// So V comes while S and dQ are multiplied, and K while dP is.
#pragma once
#include "config.h"
#include "flash/tile/mask.cuh"
#include "params.cuh"
#include "row_stats.cuh"

namespace selfattn::cuda::float32 {

struct DqTile {
  int index, batch, head, head_of_all;
  RowSegments segments;
  Interval blocks;  // of keys, in reach of its rows
};

template <class Config>
__device__ __forceinline__ DqTile describe_dq_tile(const BackwardKernelParams& p) {
  const AttentionShape& shape = p.call.shape;
  const TilePlace place = find_tile(p.of_queries, blockIdx.x);
  const int tiles = p.of_queries.tiles_per_head, batch = place.head / shape.num_heads;
  DqTile tile{place.rank, batch, place.head % shape.num_heads, place.head, segments_of_row(p.call.segments, batch), {}};
  if (p.call.segments.mode)
    tile.index = ordered_tile<typename Config::Table>(p.call.segments.query_order, batch, tiles, place.rank);
  else if (p.call.window.right < AttentionWindow::kUnbounded)
    tile.index = tiles - 1 - place.rank;  // the last see the most keys
  const int first = tile.index * Config::kTileQuery, last = min(first + Config::kTileQuery, shape.query_length) - 1;
  const bool has_runs = tile.segments.has_runs;
  tile.blocks =
      blocks_of({visible_keys(p.call, batch, has_runs, first).begin, visible_keys(p.call, batch, has_runs, last).end},
                Config::kTileKey);
  return tile;
}

// The sums of the warps that share rows, through shared memory that nobody reads any more; whole in those of part 0.
template <int kRowThreads, int kGroups, int kCount>
__device__ __forceinline__ void add_parts(float (&sum)[kGroups][kCount], int part, unsigned char* s_memory) {
  float* s_sums = reinterpret_cast<float*>(s_memory) + threadIdx.x % kRowThreads;
#pragma unroll
  for (int g = 0; g < kGroups; g++)
#pragma unroll
    for (int i = 0; i < kCount; i++)
      if (part != 0) s_sums[(g * kCount + i) * kRowThreads] = sum[g][i];
  __syncthreads();
#pragma unroll
  for (int g = 0; g < kGroups; g++)
#pragma unroll
    for (int i = 0; i < kCount; i++)
      if (part == 0) sum[g][i] += s_sums[(g * kCount + i) * kRowThreads];
}

// Returns whether the tile must be computed with more care; then nothing is stored.
template <class Config, bool kIsRepair>
__device__ __forceinline__ bool sum_query_gradients(const BackwardKernelParams& p, const DqTile& tile,
                                                    typename Config::SharedStorage& s) {
  using Query = typename Config::Query;
  using Key = typename Config::Key;
  constexpr Precision kPrecision = Config::kPrecision;
  constexpr int kTileKey = Config::kTileKey, kColumns = Config::kColumns, kGroups = Config::kRowGroups,
                kThreads = Config::kThreads;
  const BackwardParams& call = p.call;
  const AttentionShape& shape = call.shape;
  const SegmentTables& segments = call.segments;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, part = warp / Config::kRowWarps;
  const int warp_row = warp % Config::kRowWarps * Config::kWarpRows, first_row = tile.index * Config::kTileQuery;
  const int kv_head = tile.head / (shape.num_heads / shape.num_kv_heads);
  const LogitScale scale = make_logit_scale(call.scale, call.softcap);

  const auto load_key = [&](int block) {
    Key::template load<kThreads>(ptx::shared_address(s.k), head_of(call.k, tile.batch, kv_head), call.k.stride_token,
                                 block * kTileKey, shape.key_length, shape.dim_qk);
  };
  const auto load_value = [&](int block) {
    Key::template load<kThreads>(ptx::shared_address(s.v), head_of(call.v, tile.batch, kv_head), call.v.stride_token,
                                 block * kTileKey, shape.key_length, shape.dim_v);
  };
  const auto keys_of = [&](int row_in_tile) {
    return visible_keys(call, tile.batch, tile.segments.has_runs, min(first_row + row_in_tile, shape.query_length - 1));
  };

  const auto test = [&](int index, bool& meets, bool& is_uniform) {
    if (!tile.segments.has_ids) return;
    const SegmentBlock queries =
        tile_of_blocks<Config::Table::kOfTile>(segments.query_blocks + int64_t(tile.batch) * segments.query_tiles,
                                               first_row / kTableBlock, segments.query_tiles);
    const SegmentBlock keys =
        segments.key_blocks[int64_t(tile.batch) * segments.key_tiles + index * kTileKey / kTableBlock];
    meets = may_share_segment(queries, keys), is_uniform = is_one_segment(queries, keys);
  };
  KeyBlockWalk walk(tile.blocks.begin, tile.blocks.end, -1);
  KeyBlock block{0, false, false}, next{0, false, false};
  bool has_block = walk.find_next(block, test);

  Query::template load<kThreads>(ptx::shared_address(s.q), head_of(call.q, tile.batch, tile.head), call.q.stride_token,
                                 first_row, shape.query_length, shape.dim_qk);
  Query::template load<kThreads>(ptx::shared_address(s.grad_out), head_of(call.grad_out, tile.batch, tile.head),
                                 call.grad_out.stride_token, first_row, shape.query_length, shape.dim_v);
  if (has_block) load_value(block.index);
  ptx::commit_copies();
  ptx::wait_for_copies<0>();
  Query::template prepare_left<kPrecision, kThreads>(s.q);
  Query::template prepare_left<kPrecision, kThreads>(s.grad_out);

  const WarpReach reach(keys_of(warp_row), keys_of(warp_row + Config::kWarpRows - 1));
  float lse[kGroups][2], delta[kGroups][2], grad_q[kGroups][Config::kDim / 2];
#pragma unroll
  for (int g = 0; g < kGroups; g++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int64_t place =
          int64_t(tile.head_of_all) * p.stat_pitch + first_row + warp_row + kProductRows * g + 8 * r + lane / 4;
      lse[g][r] = p.lse[place], delta[g][r] = p.delta[place];
    }
  clear(grad_q);

#pragma unroll 1
  while (has_block) {
    const bool has_next = walk.find_next(next, test);
    const int first_key = block.index * kTileKey + part * kColumns;
    const bool is_needed = reach.meets(first_key, kColumns), is_cut = !reach.covers(first_key, kColumns);
    ptx::wait_for_copies<0>();
    __syncthreads();  // V is there, and K of the block before has been read
    load_key(block.index);
    ptx::commit_copies();

    float scores[kGroups][kColumns / 2], dp[kGroups][kColumns / 2];
    if (is_needed) {
      multiply_rows<kPrecision, Query, Key, false>(
          dp, Query::left_place(ptx::shared_address(s.grad_out), warp_row),
          Key::right_place(ptx::shared_address(s.v)) + part * kColumns * kPanelRowBytes);
      if constexpr (kIsRepair) correct_products<Query, Key>(dp, s.grad_out, warp_row, s.v, part * kColumns);
    }

    ptx::wait_for_copies<0>();
    __syncthreads();  // K is there, and V has been read
    if (has_next) load_value(next.index);
    ptx::commit_copies();

    if (is_needed) {
      multiply_rows<kPrecision, Query, Key, false>(
          scores, Query::left_place(ptx::shared_address(s.q), warp_row),
          Key::right_place(ptx::shared_address(s.k)) + part * kColumns * kPanelRowBytes);
      if constexpr (kIsRepair) correct_products<Query, Key>(scores, s.q, warp_row, s.k, part * kColumns);
      if (scale.has_softcap) {
        cap_scores(scores, scale);
#pragma unroll
        for (int g = 0; g < kGroups; g++)  // dP - delta, times the slope of the softcap
#pragma unroll
          for (int i = 0; i < kColumns / 2; i++)
            dp[g][i] = score_gradient<false>(1.f, dp[g][i], delta[g][i / 2 % 2], scores[g][i]);
      }
#pragma unroll
      for (int g = 0; g < kGroups; g++)
#pragma unroll
        for (int i = 0; i < kColumns / 2; i++)
          scores[g][i] = exponent(scores[g][i], scale.of_scores, lse[g][i / 2 % 2]);
      // Behind the statistics, which may be NaN: P of a masked pair is 0 all the same.
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
      for (int g = 0; g < kGroups; g++)
#pragma unroll
        for (int i = 0; i < kColumns / 2; i++)
          scores[g][i] = score_gradient<kIsRepair>(ptx::exp2_approx(scores[g][i]), dp[g][i],
                                                   scale.has_softcap ? 0.f : delta[g][i / 2 % 2], 0.f);
    }
    if constexpr (kIsRepair) {
      if (is_needed) add_exceptional<Key>(grad_q, scores, s.k, part * kColumns);
      __syncthreads();  // all have read K as it came
      clear_exceptional<Key, kThreads>(s.k);
      __syncthreads();
    }
    if (is_needed) accumulate<kPrecision, Key>(grad_q, scores, s.k + part * kColumns * kPanelRowBytes);
    block = next, has_block = has_next;
  }

  bool is_good = true;
#pragma unroll
  for (int g = 0; g < kGroups; g++)
#pragma unroll
    for (int r = 0; r < 2; r++) is_good = is_good && (kIsRepair || is_row_finite(grad_q[g], r));
  if (__syncthreads_or(!is_good)) return true;
  if constexpr (Config::kKeyParts > 1) {
    static_assert(Config::kRowWarps * kWarpSize * kGroups * Config::kDim / 2 * 4 <= Query::kBytes);
    add_parts<Config::kRowWarps * kWarpSize>(grad_q, part, s.q);
  }
  if (part == 0)
    store_rows<Config::kLayout>(grad_q, call.scale, head_of(call.grad_q, tile.batch, tile.head),
                                call.grad_q.stride_token, first_row + warp_row, shape.query_length, shape.dim_qk);
  return false;
}

// Apart from the first pass, whose registers it must not take.
template <class Config>
__device__ __noinline__ void repair_query_gradients(const BackwardKernelParams& p, const DqTile& tile,
                                                    typename Config::SharedStorage& s) {
  sum_query_gradients<Config, true>(p, tile, s);
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksAtOnce)
    flash_attention_backward_dq_kernel(const __grid_constant__ BackwardKernelParams p) {
  extern __shared__ __align__(128) unsigned char s_memory[];
  auto& s = *reinterpret_cast<typename Config::SharedStorage*>(s_memory);
  const DqTile tile = describe_dq_tile<Config>(p);
  if (tile.index * Config::kTileQuery >= p.call.shape.query_length) return;
  if (sum_query_gradients<Config, false>(p, tile, s)) repair_query_gradients<Config>(p, tile, s);
}

}  // namespace selfattn::cuda::float32
