// dK and dV: a thread block a key tile, with K and V in shared memory; each warp has 16 of its keys. All share the
// blocks of queries that they load, of one query head of the group after another, always in the same order. S^T = K Q^T
// and dP^T = V dO^T have keys as rows, so that P^T and dS^T are left operands as they come.
//
//   wait for Q | start dO | S^T, P^T | wait for dO | dP^T, dS^T | dK += dS^T Q | start the next Q | dV += P^T dO
//
// Of wide heads, whose two sums the registers of a warp do not hold, one warp sums dK and another dV of the same keys;
// both multiply S^T. The next Q starts behind both then.
//
// K and V are read once, ahead of everything else, so dK may be written over K and dV over V.
#pragma once
#include "config.h"
#include "flash/tile/mask.cuh"
#include "params.cuh"
#include "row_stats.cuh"

namespace selfattn::cuda::float32 {

struct KeyTile {
  int index, batch, kv_head;
  RowSegments segments;
  Interval blocks;  // of queries, in reach of its keys
};

template <class Config>
__device__ __forceinline__ KeyTile describe_key_tile(const BackwardKernelParams& p) {
  const AttentionShape& shape = p.call.shape;
  const TilePlace place = find_tile(p.of_keys, blockIdx.x);
  const int tiles = p.of_keys.tiles_per_head, batch = place.head / shape.num_kv_heads;
  // Under a causal limit the first keys are seen by the most queries.
  KeyTile tile{place.rank, batch, place.head % shape.num_kv_heads, segments_of_row(p.call.segments, batch), {}};
  if (p.call.segments.mode)
    tile.index = ordered_tile<typename Config::Table>(p.call.segments.order, batch, tiles, place.rank);
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

// The blocks of all heads of a group. By whole warps, as KeyBlockWalk.
class QueryBlockWalk {
 public:
  __device__ __forceinline__ QueryBlockWalk(const Interval& blocks, int heads)
      : blocks_(blocks), heads_(heads), of_head_(blocks.begin, blocks.end, -1) {}

  template <class Test>
  __device__ __forceinline__ bool find_next(QueryBlock& block, const Test& test) {
    KeyBlock found;
    while (!of_head_.find_next(found, test)) {
      if (++head_ >= heads_) return false;
      of_head_ = KeyBlockWalk(blocks_.begin, blocks_.end, -1);
    }
    block = {found.index, head_, found.by_ids};
    return true;
  }

 private:
  Interval blocks_;
  int heads_, head_ = 0;
  KeyBlockWalk of_head_;
};

// Returns whether the tile must be computed with more care; then nothing is stored. K and V are in shared memory, or on
// their way.
template <class Config, bool kIsRepair>
__device__ __forceinline__ bool sum_key_gradients(const BackwardKernelParams& p, const KeyTile& tile,
                                                  typename Config::SharedStorage& s) {
  using Query = typename Config::Query;
  using Key = typename Config::Key;
  constexpr Precision kPrecision = Config::kPrecision;
  constexpr bool kTogether = Config::kSumsTogether;
  constexpr int kTileQuery = Config::kTileQuery, kGroups = Config::kRowGroups, kThreads = Config::kThreads;
  const BackwardParams& call = p.call;
  const AttentionShape& shape = call.shape;
  const SegmentTables& segments = call.segments;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warp_row = warp % Config::kRowWarps * Config::kWarpRows, first_row = tile.index * Config::kTileKey;
  const bool sums_key = kTogether || warp < Config::kRowWarps, sums_value = kTogether || !sums_key;
  const int group_size = shape.num_heads / shape.num_kv_heads, first_head = tile.kv_head * group_size;
  const LogitScale scale = make_logit_scale(call.scale, Config::kHasSoftcap ? call.softcap : 0.f);

  // Q comes with the statistics of its rows.
  const auto load_query = [&](const QueryBlock& block) {
    const int head = first_head + block.head;
    Query::template load<kThreads>(ptx::shared_address(s.q), head_of(call.q, tile.batch, head), call.q.stride_token,
                                   block.index * kTileQuery, shape.query_length, shape.dim_qk);
    constexpr int kStatChunks = kTileQuery / kChunkElements;
    static_assert(2 * kStatChunks <= kThreads);
    if (threadIdx.x < 2 * kStatChunks) {
      const bool is_delta = threadIdx.x >= kStatChunks;
      const int column = threadIdx.x % kStatChunks * kChunkElements;
      const float* g_stats = (is_delta ? p.delta : p.lse) +
                             (int64_t(tile.batch) * shape.num_heads + head) * p.stat_pitch + block.index * kTileQuery;
      ptx::copy_async(ptx::shared_address((is_delta ? s.delta : s.lse) + column), g_stats + column, true);
    }
  };
  const auto load_grad_out = [&](const QueryBlock& block) {
    Query::template load<kThreads>(
        ptx::shared_address(s.grad_out), head_of(call.grad_out, tile.batch, first_head + block.head),
        call.grad_out.stride_token, block.index * kTileQuery, shape.query_length, shape.dim_v);
  };
  const auto queries_of = [&](int row_in_tile) {
    return visible_queries(call, tile.batch, tile.segments.has_runs,
                           min(first_row + row_in_tile, shape.key_length - 1));
  };

  const auto test = [&](int index, bool& meets, bool& is_uniform) {
    if (!tile.segments.has_ids) return;
    const SegmentBlock
        keys = segments.key_blocks[int64_t(tile.batch) * segments.key_tiles + first_row / kTableBlock],
        queries = segments.query_blocks[int64_t(tile.batch) * segments.query_tiles + index * kTileQuery / kTableBlock];
    meets = may_share_segment(queries, keys), is_uniform = is_one_segment(queries, keys);
  };
  QueryBlockWalk walk(tile.blocks, group_size);
  QueryBlock block{0, 0, false}, next{0, 0, false};
  bool has_block = walk.find_next(block, test);
  if (has_block) load_query(block);
  ptx::commit_copies();
  if constexpr (!kIsRepair) {
    ptx::wait_for_copies<0>();
    Key::template prepare_left<kPrecision, kThreads>(s.k);
    Key::template prepare_left<kPrecision, kThreads>(s.v);
  }

  const WarpReach reach(queries_of(warp_row), queries_of(warp_row + Config::kWarpRows - 1));
  const bool has_keys = first_row + warp_row < shape.key_length;
  float grad_k[kGroups][Config::kDim / 2];                  // not together: dV of the warps that sum it
  float grad_v[kGroups][kTogether ? Config::kDim / 2 : 1];  // together
  clear(grad_k), clear(grad_v);

#pragma unroll 1
  while (has_block) {
    const bool has_next = walk.find_next(next, test);
    const int first_query = block.index * kTileQuery;
    const bool is_needed = has_keys && reach.meets(first_query, kTileQuery),
               is_cut = !reach.covers(first_query, kTileQuery);
    ptx::wait_for_copies<0>();
    __syncthreads();  // Q is there, and dO of the block before has been read
    load_grad_out(block);
    ptx::commit_copies();

    float weights[kGroups][kTileQuery / 2], dp[kGroups][kTileQuery / 2];
    float capped[kGroups][Config::kHasSoftcap ? kTileQuery / 2 : 1];
    const int stat_column = 2 * (lane % 4);
    if (is_needed) {
      multiply_rows<kPrecision, Key, Query, true>(weights, Key::left_place(ptx::shared_address(s.k), warp_row),
                                                  Query::right_place(ptx::shared_address(s.q)));
      if constexpr (kIsRepair) correct_products<Key, Query>(weights, s.k, warp_row, s.q, 0);
      if constexpr (Config::kHasSoftcap) {
        cap_scores(weights, scale);
#pragma unroll
        for (int g = 0; g < kGroups; g++)
#pragma unroll
          for (int i = 0; i < kTileQuery / 2; i++) capped[g][i] = weights[g][i];
      }
#pragma unroll
      for (int i = 0; i < kTileQuery / 8; i++) {
        const float2 lse = *reinterpret_cast<const float2*>(s.lse + stat_column + 8 * i);
#pragma unroll
        for (int g = 0; g < kGroups; g++)
#pragma unroll
          for (int j = 0; j < 4; j++)
            weights[g][4 * i + j] = exponent(weights[g][4 * i + j], scale.of_scores, j % 2 ? lse.y : lse.x);
      }
      // Behind the statistics, which may be NaN: P of a masked pair is 0 all the same.
      if (is_cut || block.by_ids) {
        const int first_column = first_query + 2 * (lane % 4);
#pragma unroll
        for (int g = 0; g < kGroups; g++) {
          const int row = warp_row + kProductRows * g + lane / 4;
          if (is_cut) {
            const Interval queries[2] = {queries_of(row), queries_of(row + 8)};
            mask_by_intervals<true>(weights[g], queries, first_column);
          }
          if (block.by_ids) {
            const int* g_ids = segments.key_ids + int64_t(tile.batch) * segments.pitch_key + first_row + row;
            const int ids[2] = {g_ids[0], g_ids[8]};
            mask_by_ids(weights[g], ids,
                        segments.query_ids + int64_t(tile.batch) * segments.pitch_query + first_column);
          }
        }
      }
#pragma unroll
      for (int g = 0; g < kGroups; g++)
#pragma unroll
        for (int i = 0; i < kTileQuery / 2; i++) weights[g][i] = ptx::exp2_approx(weights[g][i]);
    }

    ptx::wait_for_copies<0>();
    __syncthreads();  // dO is there
    if (is_needed && sums_key) {
      multiply_rows<kPrecision, Key, Query, true>(dp, Key::left_place(ptx::shared_address(s.v), warp_row),
                                                  Query::right_place(ptx::shared_address(s.grad_out)));
      if constexpr (kIsRepair) correct_products<Key, Query>(dp, s.v, warp_row, s.grad_out, 0);
#pragma unroll
      for (int i = 0; i < kTileQuery / 8; i++) {
        const float2 delta = *reinterpret_cast<const float2*>(s.delta + stat_column + 8 * i);
#pragma unroll
        for (int g = 0; g < kGroups; g++)
#pragma unroll
          for (int j = 0; j < 4; j++)
            dp[g][4 * i + j] =
                score_gradient<kIsRepair>(weights[g][4 * i + j], dp[g][4 * i + j], j % 2 ? delta.y : delta.x,
                                          Config::kHasSoftcap ? capped[g][4 * i + j] : 0.f);
      }
    }
    if constexpr (!kTogether) {  // the one left operand of the warp
#pragma unroll
      for (int g = 0; g < kGroups; g++)
#pragma unroll
        for (int i = 0; i < kTileQuery / 2; i++) dp[g][i] = sums_key ? dp[g][i] : weights[g][i];
    }
    unsigned char* s_right = sums_key ? s.q : s.grad_out;
    if constexpr (kIsRepair) {
      if (is_needed) add_exceptional<Query>(grad_k, dp, s_right, 0);
      if constexpr (kTogether)
        if (is_needed) add_exceptional<Query>(grad_v, weights, s.grad_out, 0);
      __syncthreads();  // all have read Q and dO as they came
      clear_exceptional<Query, kThreads>(s.q);
      clear_exceptional<Query, kThreads>(s.grad_out);
      __syncthreads();
    }
    if (is_needed) accumulate<kPrecision, Query>(grad_k, dp, s_right);
    __syncthreads();  // Q has been read
    if (has_next) load_query(next);
    ptx::commit_copies();
    if constexpr (kTogether)
      if (is_needed) accumulate<kPrecision, Query>(grad_v, weights, s.grad_out);
    block = next, has_block = has_next;
  }

  bool is_good = true;
#pragma unroll
  for (int g = 0; g < kGroups; g++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const bool is_there = first_row + warp_row + kProductRows * g + 8 * r + lane / 4 < shape.key_length;
      if (kIsRepair || !is_there) continue;
      is_good = is_good && is_row_finite(grad_k[g], r);
      if constexpr (kTogether) is_good = is_good && is_row_finite(grad_v[g], r);
    }
  if (__syncthreads_or(!is_good)) return true;
  const auto store = [&](const auto& sum, float factor, const TensorView& gradient, int dim) {
    store_rows<Config::kLayout>(sum, factor, head_of(gradient, tile.batch, tile.kv_head), gradient.stride_token,
                                first_row + warp_row, shape.key_length, dim);
  };
  if (sums_key) store(grad_k, call.scale, call.grad_k, shape.dim_qk);
  if constexpr (kTogether)
    store(grad_v, 1.f, call.grad_v, shape.dim_v);
  else if (sums_value)
    store(grad_k, 1.f, call.grad_v, shape.dim_v);
  return false;
}

// Apart from the first pass, whose registers it must not take.
template <class Config>
__device__ __noinline__ void repair_key_gradients(const BackwardKernelParams& p, const KeyTile& tile,
                                                  typename Config::SharedStorage& s) {
  sum_key_gradients<Config, true>(p, tile, s);
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksAtOnce)
    flash_attention_backward_dkdv_kernel(const __grid_constant__ BackwardKernelParams p) {
  extern __shared__ __align__(128) unsigned char s_memory[];
  auto& s = *reinterpret_cast<typename Config::SharedStorage*>(s_memory);
  const KeyTile tile = describe_key_tile<Config>(p);
  const AttentionShape& shape = p.call.shape;
  if (tile.index * Config::kTileKey >= shape.key_length) return;
  using Key = typename Config::Key;
  Key::template load<Config::kThreads>(ptx::shared_address(s.k), head_of(p.call.k, tile.batch, tile.kv_head),
                                       p.call.k.stride_token, tile.index * Config::kTileKey, shape.key_length,
                                       shape.dim_qk);
  Key::template load<Config::kThreads>(ptx::shared_address(s.v), head_of(p.call.v, tile.batch, tile.kv_head),
                                       p.call.v.stride_token, tile.index * Config::kTileKey, shape.key_length,
                                       shape.dim_v);
  if (sum_key_gradients<Config, false>(p, tile, s)) repair_key_gradients<Config>(p, tile, s);
}

}  // namespace selfattn::cuda::float32
