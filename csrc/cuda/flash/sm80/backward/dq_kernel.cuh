// dQ: a thread block a query tile; each warp has 16 or 32 rows of it to itself, and all share the blocks of keys and
// values that they load.
//
//   wait for V | start K | dP = dO V^T | wait for K | start the next V | S = Q K^T, P, dS | dQ += dS K
//
// So V comes while S and dQ are multiplied, and K while dP is.
#pragma once
#include "config.h"
#include "flash/tile/mask.cuh"
#include "flash/tile/row_segments.cuh"
#include "params.cuh"
#include "products.cuh"
#include "row_stats.cuh"

namespace selfattn::cuda::sm80 {

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
    tile.index = p.call.segments.query_order[batch * tiles + place.rank];
  else if (p.call.window.right < AttentionWindow::kUnbounded)
    tile.index = tiles - 1 - place.rank;  // the last see the most keys
  const int first = tile.index * Config::kTileQuery, last = min(first + Config::kTileQuery, shape.query_length) - 1;
  const bool has_runs = tile.segments.has_runs;
  tile.blocks =
      blocks_of({visible_keys(p.call, batch, has_runs, first).begin, visible_keys(p.call, batch, has_runs, last).end},
                Config::kTileKey);
  return tile;
}

// Returns whether the tile must be computed with more care; then nothing is stored.
template <class Config, bool kIsRepair>
__device__ __forceinline__ bool sum_query_gradients(const BackwardKernelParams& p, const DqTile& tile,
                                                    typename Config::SharedStorage& s) {
  using Element = typename Config::Element;
  using Query = typename Config::Query;
  using GradOut = typename Config::GradOut;
  using Key = typename Config::Key;
  using Value = typename Config::Value;
  constexpr int kTileKey = Config::kTileKey, kGroups = Config::kRowGroups;
  const BackwardParams& call = p.call;
  const AttentionShape& shape = call.shape;
  const SegmentTables& segments = call.segments;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warp_row = warp * Config::kWarpRows, first_row = tile.index * Config::kTileQuery;
  const int kv_head = tile.head / (shape.num_heads / shape.num_kv_heads);
  const uint32_t s_q = ptx::shared_address(s.q), s_grad_out = ptx::shared_address(s.grad_out),
                 s_k = ptx::shared_address(s.k), s_v = ptx::shared_address(s.v);
  const float logit_scale = p.logit_scale<Config>(), scale_log2 = logit_scale * kLog2E;

  const typename Key::template Source<Config::kThreads> keys(head_of(call.k, tile.batch, kv_head), call.k.stride_token,
                                                             shape.dim_qk);
  const typename Value::template Source<Config::kThreads> values(head_of(call.v, tile.batch, kv_head),
                                                                 call.v.stride_token, shape.dim_v);
  const auto load_key = [&](int block) { Key::load(s_k, keys, block * kTileKey, shape.key_length); };
  const auto load_value = [&](int block) { Value::load(s_v, values, block * kTileKey, shape.key_length); };
  const auto keys_of = [&](int row_in_tile) {
    return visible_keys(call, tile.batch, tile.segments.has_runs, min(first_row + row_in_tile, shape.query_length - 1));
  };

  const auto test = [&](int index, bool& meets, bool& is_uniform) {
    if (!tile.segments.has_ids) return;
    constexpr int kQueryBlocks = Config::kTileQuery / kQueryBlock;
    const SegmentBlock queries =
        tile_of_blocks<kQueryBlocks>(segments.query_blocks + int64_t(tile.batch) * segments.query_tiles,
                                     tile.index * kQueryBlocks, segments.query_tiles);
    const SegmentBlock keys =
        segments.key_blocks[int64_t(tile.batch) * segments.key_tiles + index * kTileKey / Config::kKeyBlock];
    meets = may_share_segment(queries, keys), is_uniform = is_one_segment(queries, keys);
  };
  KeyBlockWalk walk(tile.blocks);
  KeyBlock block{0, false, false}, next{0, false, false};
  bool has_block = walk.find_next(block, test);

  Query::template load<Config::kThreads>(
      s_q, {head_of(call.q, tile.batch, tile.head), call.q.stride_token, shape.dim_qk}, first_row, shape.query_length);
  GradOut::template load<Config::kThreads>(
      s_grad_out, {head_of(call.grad_out, tile.batch, tile.head), call.grad_out.stride_token, shape.dim_v}, first_row,
      shape.query_length);
  if (has_block) load_value(block.index);
  ptx::commit_copies();

  const WarpReach reach(keys_of(warp_row), keys_of(warp_row + Config::kWarpRows - 1));
  float lse_log2[kGroups][2], delta[kGroups][2], grad_q[kGroups][Config::kDimQk / 2];
  bool has_large_logits = false;
#pragma unroll
  for (int g = 0; g < kGroups; g++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int64_t place = int64_t(tile.head_of_all) * p.stat_pitch + first_row + warp_row + 16 * g + 8 * r + lane / 4;
      lse_log2[g][r] = p.lse_log2[place], delta[g][r] = p.delta[place];
      has_large_logits = has_large_logits || is_large(lse_log2[g][r]);
    }
  clear(grad_q);

#pragma unroll 1
  while (has_block) {
    const bool has_next = walk.find_next(next, test);
    const int first_key = block.index * kTileKey;
    const bool is_needed = reach.meets(first_key, kTileKey), is_cut = !reach.covers(first_key, kTileKey);
    ptx::wait_for_copies<0>();
    __syncthreads();  // V is there, and K of the block before has been read
    load_key(block.index);
    ptx::commit_copies();

    float scores[kGroups][kTileKey / 2], dp[kGroups][kTileKey / 2];
    if (is_needed)
      multiply_rows<Element, GradOut, Value>(dp, GradOut::left_place(s_grad_out, warp_row), Value::right_place(s_v));

    ptx::wait_for_copies<0>();
    __syncthreads();  // K is there, and V has been read
    if (has_next) load_value(next.index);
    ptx::commit_copies();

    uint32_t score_gradients[kGroups][kTileKey / 4];
    if (is_needed) {
      multiply_rows<Element, Query, Key>(scores, Query::left_place(s_q, warp_row), Key::right_place(s_k));
      if constexpr (Config::kHasSoftcap) {
#pragma unroll
        for (int g = 0; g < kGroups; g++) p.softcap.apply(scores[g]);
      }
#pragma unroll
      for (int g = 0; g < kGroups; g++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const bool is_exact = kIsRepair && is_large(lse_log2[g][r]);
          float lse = 0.f;
          if (is_exact)
            lse = call.lse[int64_t(tile.head_of_all) * shape.query_length + first_row + warp_row + 16 * g + 8 * r +
                           lane / 4];
#pragma unroll
          for (int i = 0; i < kTileKey / 4; i++) {
            float& x = scores[g][i / 2 * 4 + 2 * r + i % 2];
            const float exp = is_exact ? exact_exponent(x, logit_scale, lse) : exponent(x, scale_log2, lse_log2[g][r]);
            if constexpr (Config::kHasSoftcap)
              take_weight(x, exp);
            else
              x = exp;
          }
        }
      // Behind the statistics, which may be NaN: P of a masked pair is 0 all the same.
      if (is_cut || block.by_ids) {
        const int first_column = first_key + 2 * (lane % 4);
#pragma unroll
        for (int g = 0; g < kGroups; g++) {
          const int row = warp_row + 16 * g + lane / 4;
          if (is_cut) {
            const Interval keys[2] = {keys_of(row), keys_of(row + 8)};
            mask_by_intervals<true>(scores[g], keys, first_column);
          }
          if (block.by_ids) {
            const int* g_ids = segments.query_ids + int64_t(tile.batch) * segments.pitch_query + first_row + row;
            const int ids[2] = {g_ids[0], g_ids[8]};
            mask_by_ids(scores[g], ids, segments.key_ids + int64_t(tile.batch) * segments.pitch_key + first_column);
          }
          if constexpr (Config::kHasSoftcap) clear_masked(scores[g]);
        }
      }
#pragma unroll
      for (int g = 0; g < kGroups; g++)
#pragma unroll
        for (int i = 0; i < kTileKey / 2; i++) {
          const float weight = Config::kHasSoftcap ? scores[g][i] : ptx::exp2_approx(scores[g][i]);
          scores[g][i] = score_gradient<kIsRepair>(weight, dp[g][i], delta[g][i / 2 % 2]);
        }
      pack_left<Element>(scores, score_gradients);
    }
    if constexpr (kIsRepair) {
      __syncthreads();  // all have read K as it came
      clear_non_finite_rows<Element, Key, Config::kWarps>(s.k, 0, kTileKey);
      __syncthreads();
    }
    if (is_needed) accumulate<Element, Key>(grad_q, score_gradients, Key::left_place(s_k, 0));
    block = next, has_block = has_next;
  }

  bool is_good = kIsRepair || !has_large_logits;
#pragma unroll
  for (int g = 0; g < kGroups; g++)
#pragma unroll
    for (int r = 0; r < 2; r++) is_good = is_good && (kIsRepair || is_row_finite(grad_q[g], r));
  ptx::wait_for_copies<0>();  // of Q, where there was no block: dQ takes its memory
  if (__syncthreads_or(!is_good)) return true;
  store_rows<Element, Query>(grad_q, call.scale, s.q, head_of(call.grad_q, tile.batch, tile.head),
                             call.grad_q.stride_token, first_row, warp_row, shape.query_length, shape.dim_qk);
  return false;
}

// Apart from the first pass, whose registers it must not take; so it finds out for itself what the tile is.
template <class Config>
__device__ __noinline__ void repair_query_gradients(const BackwardKernelParams& p, typename Config::SharedStorage& s) {
  const DqTile tile = describe_dq_tile<Config>(p);
  sum_query_gradients<Config, true>(p, tile, s);
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksAtOnce)
    flash_attention_backward_dq_kernel(const __grid_constant__ BackwardKernelParams p) {
  extern __shared__ __align__(128) unsigned char s_memory[];
  auto& s = *reinterpret_cast<typename Config::SharedStorage*>(s_memory);
  const DqTile tile = describe_dq_tile<Config>(p);
  if (sum_query_gradients<Config, false>(p, tile, s)) repair_query_gradients<Config>(p, s);
}

}  // namespace selfattn::cuda::sm80
