// dK and dV: a thread block a key tile, with K and V in shared memory; each warp has 16 or 32 of its keys to itself.
// All share the blocks of queries that they load, of one query head of the group after another, always in the same
// order. S^T = K Q^T and dP^T = V dO^T have keys as rows, so that P^T and dS^T are left operands as they come.
//
//   wait for Q | start dO | S^T, P^T | wait for dO | dP^T, dS^T | dK += dS^T Q | start the next Q | dV += P^T dO
//
// Wide heads, whose two sums the registers do not hold, walk twice over the queries:
//   dK   wait for dO | start Q | dP^T | wait for Q | start the next dO | S^T, P^T, dS^T | dK += dS^T Q
//   dV   wait for Q | start dO | S^T, P^T | wait for dO | start the next Q | dV += P^T dO
//
// K and V are read once, ahead of everything else, so dK may be written over K and dV over V.
#pragma once
#include "config.h"
#include "params.cuh"
#include "products.cuh"
#include "transposed_scores.cuh"

namespace selfattn::cuda::sm80 {

enum class KeySums { kBoth, kGradKey, kGradValue };

// Returns whether the tile must be computed with more care; then nothing is stored. K and V are in shared memory, or on
// their way.
template <class Config, KeySums kSums, bool kIsRepair>
__device__ __forceinline__ bool sum_key_gradients(const BackwardKernelParams& p, const KeyTile& tile,
                                                  typename Config::SharedStorage& s) {
  using Element = typename Config::Element;
  using Query = typename Config::Query;
  using GradOut = typename Config::GradOut;
  using Key = typename Config::Key;
  using Value = typename Config::Value;
  constexpr bool kHasGradKey = kSums != KeySums::kGradValue, kHasGradValue = kSums != KeySums::kGradKey;
  constexpr int kTileQuery = Config::kTileQuery, kColumns = Config::kQueriesAtOnce, kGroups = Config::kRowGroups;
  const BackwardParams& call = p.call;
  const AttentionShape& shape = call.shape;
  const SegmentTables& segments = call.segments;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warp_row = warp * Config::kWarpRows, first_row = tile.index * Config::kTileKey;
  const int group_size = shape.num_heads / shape.num_kv_heads, first_head = tile.kv_head * group_size;
  const uint32_t s_q = ptx::shared_address(s.q), s_grad_out = ptx::shared_address(s.grad_out),
                 s_k = ptx::shared_address(s.k), s_v = ptx::shared_address(s.v);
  const float logit_scale = p.logit_scale<Config>();

  // Q comes with the statistics of its rows.
  const auto load_query = [&](const QueryBlock& block) {
    const int head = first_head + block.head;
    Query::template load<Config::kThreads>(s_q, {head_of(call.q, tile.batch, head), call.q.stride_token, shape.dim_qk},
                                           block.index * kTileQuery, shape.query_length);
    constexpr int kFloatsOfChunk = kChunkBytes / 4, kStatChunks = kTileQuery / kFloatsOfChunk;
    static_assert(2 * kStatChunks <= Config::kThreads);
    if (threadIdx.x < 2 * kStatChunks) {
      const bool is_delta = threadIdx.x >= kStatChunks;
      const int column = threadIdx.x % kStatChunks * kFloatsOfChunk;
      const float* g_stats = (is_delta ? p.delta : p.lse_log2) +
                             (int64_t(tile.batch) * shape.num_heads + head) * p.stat_pitch + block.index * kTileQuery;
      ptx::copy_async(ptx::shared_address((is_delta ? s.delta : s.lse_log2) + column), g_stats + column, true);
    }
  };
  const auto load_grad_out = [&](const QueryBlock& block) {
    GradOut::template load<Config::kThreads>(
        s_grad_out,
        {head_of(call.grad_out, tile.batch, first_head + block.head), call.grad_out.stride_token, shape.dim_v},
        block.index * kTileQuery, shape.query_length);
  };
  const auto queries_of = [&](int row_in_tile) {
    return visible_queries(call, tile.batch, tile.segments.has_runs,
                           min(first_row + row_in_tile, shape.key_length - 1));
  };

  const auto test = [&](int index, bool& meets, bool& is_uniform) {
    compare_ids<Config>(segments, tile, index, meets, is_uniform);
  };
  QueryBlockWalk walk(tile.blocks, group_size, tile.segments.has_ids);
  QueryBlock block{0, 0, false}, next{0, 0, false};
  bool has_block = walk.find_next(block, test);
  if (has_block) {
    if constexpr (kSums == KeySums::kGradKey)
      load_grad_out(block);
    else
      load_query(block);
  }
  ptx::commit_copies();

  const WarpReach reach(queries_of(warp_row), queries_of(warp_row + Config::kWarpRows - 1));
  const bool has_keys = first_row + warp_row < shape.key_length;
  float grad_k[kGroups][kHasGradKey ? Config::kDimQk / 2 : 1], grad_v[kGroups][kHasGradValue ? Config::kDimV / 2 : 1];
  clear(grad_k), clear(grad_v);
  bool has_large_logits = false;

#pragma unroll 1
  while (has_block) {
    const bool has_next = walk.find_next(next, test);
    ptx::wait_for_copies<0>();
    __syncthreads();  // the operand of the first product is there, and that of the last one before has been read
    if constexpr (kSums == KeySums::kGradKey)
      load_query(block);
    else
      load_grad_out(block);
    ptx::commit_copies();

#pragma unroll 1
    for (int part = 0; part < Config::kParts; part++) {
      const int first_query = block.index * kTileQuery + part * kColumns, part_bytes = part * kColumns * kPanelRowBytes;
      const bool is_needed = has_keys && reach.meets(first_query, kColumns),
                 is_cut = !reach.covers(first_query, kColumns);
      // With softcap `weights` are the slope weights where dK is wanted, and P is packed as soon as it is there.
      constexpr bool kPacksEarly = Config::kHasSoftcap && kSums == KeySums::kBoth;
      float weights[kGroups][kColumns / 2], dp[kGroups][kColumns / 2];
      uint32_t packed_weights[kGroups][kColumns / 4];
      const float *s_lse_log2 = s.lse_log2 + part * kColumns + 2 * (lane % 4),
                  *s_delta = s.delta + part * kColumns + 2 * (lane % 4);

      const auto multiply_dp = [&] {
        if (is_needed)
          multiply_rows<Element, Value, GradOut>(dp, Value::left_place(s_v, warp_row),
                                                 GradOut::right_place(s_grad_out) + part_bytes);
      };
      const auto multiply_weights = [&] {
        if (!is_needed) return;
        if (!kIsRepair) {  // each lane looks at two columns
          const float2 lse_log2 = *reinterpret_cast<const float2*>(s_lse_log2 + lane / 4 * 8 % kColumns);
          has_large_logits = has_large_logits || is_large(lse_log2.x) || is_large(lse_log2.y);
        }
        multiply_rows<Element, Key, Query>(weights, Key::left_place(s_k, warp_row),
                                           Query::right_place(s_q) + part_bytes);
        if constexpr (Config::kHasSoftcap) {
#pragma unroll
          for (int g = 0; g < kGroups; g++) p.softcap.apply(weights[g]);
        }
        const float* g_lse =
            call.lse + (int64_t(tile.batch) * shape.num_heads + first_head + block.head) * shape.query_length;
        const auto lse_of = [&](int column) { return g_lse[first_query + 2 * (lane % 4) + column]; };
        if constexpr (!Config::kHasSoftcap)
          take_exponents<kIsRepair>(weights, s_lse_log2, logit_scale, lse_of);
        else if constexpr (kPacksEarly)
          take_capped_weights<Element, kIsRepair>(weights, packed_weights, s_lse_log2, logit_scale, lse_of);
        else
          take_exponents<kIsRepair>(weights, s_lse_log2, logit_scale, lse_of,
                                    [](int, int, float* pair, float first, float second) {
                                      first = take_weight(pair[0], first), second = take_weight(pair[1], second);
                                      if (!kHasGradKey) pair[0] = first, pair[1] = second;
                                    });
        // Behind the statistics, which may be NaN: P of a masked pair is 0 all the same.
        if (is_cut || block.by_ids) {
          mask_keys(weights, call, tile, first_row + warp_row + lane / 4, first_query + 2 * (lane % 4), is_cut,
                    block.by_ids);
#pragma unroll
          for (int g = 0; g < kGroups; g++) {
            if constexpr (kPacksEarly)
              clear_masked(weights[g], packed_weights[g]);
            else if constexpr (Config::kHasSoftcap)
              clear_masked(weights[g]);
          }
        }
        if constexpr (!Config::kHasSoftcap) exponentiate(weights);
      };

      if constexpr (kSums == KeySums::kGradKey) {
        multiply_dp();
        ptx::wait_for_copies<0>();
        __syncthreads();  // Q is there, and dO has been read
        if (has_next) load_grad_out(next);
        ptx::commit_copies();
        multiply_weights();
      } else {
        multiply_weights();
        if (part == 0) {
          ptx::wait_for_copies<0>();
          __syncthreads();  // dO is there, and (where dP is not wanted) Q and the statistics have been read
        }
        if constexpr (kSums == KeySums::kBoth) {
          multiply_dp();
        } else {
          if (has_next) load_query(next);
          ptx::commit_copies();
        }
      }

      uint32_t score_gradients[kGroups][kColumns / 4];
      if (is_needed) {
        if constexpr (kHasGradValue && !kPacksEarly) pack_left<Element>(weights, packed_weights);
        if constexpr (kHasGradKey) {
          take_score_gradients<kIsRepair>(weights, dp, s_delta);
          pack_left<Element>(weights, score_gradients);
        }
      }
      if constexpr (kIsRepair) {
        __syncthreads();  // all have read Q and dO as they came
        if (kHasGradKey) clear_non_finite_rows<Element, Query, Config::kWarps>(s.q, part * kColumns, kColumns);
        if (kHasGradValue)
          clear_non_finite_rows<Element, GradOut, Config::kWarps>(s.grad_out, part * kColumns, kColumns);
        __syncthreads();
      }
      if constexpr (kHasGradKey)
        if (is_needed) accumulate<Element, Query>(grad_k, score_gradients, Query::left_place(s_q, 0) + part_bytes);
      if constexpr (kSums == KeySums::kBoth) {
        if (part == Config::kParts - 1) {
          __syncthreads();  // Q has been read
          if (has_next) load_query(next);
          ptx::commit_copies();
        }
      }
      if constexpr (kHasGradValue)
        if (is_needed)
          accumulate<Element, GradOut>(grad_v, packed_weights, GradOut::left_place(s_grad_out, 0) + part_bytes);
    }
    block = next, has_block = has_next;
  }

  bool is_good = kIsRepair || !has_large_logits;
#pragma unroll
  for (int g = 0; g < kGroups; g++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const bool is_there = first_row + warp_row + 16 * g + 8 * r + lane / 4 < shape.key_length;
      if (kIsRepair || !is_there) continue;
      if constexpr (kHasGradKey) is_good = is_good && is_row_finite(grad_k[g], r);
      if constexpr (kHasGradValue) is_good = is_good && is_row_finite(grad_v[g], r);
    }
  ptx::wait_for_copies<0>();  // of K and V, where there was no block: the sums take their memory
  if (__syncthreads_or(!is_good)) return true;
  if constexpr (kHasGradKey)
    store_rows<Element, Key>(grad_k, call.scale, kHasGradValue ? s.k : s.v,
                             head_of(call.grad_k, tile.batch, tile.kv_head), call.grad_k.stride_token, first_row,
                             warp_row, shape.key_length, shape.dim_qk);
  if constexpr (kHasGradValue)
    store_rows<Element, Value>(grad_v, 1.f, s.v, head_of(call.grad_v, tile.batch, tile.kv_head),
                               call.grad_v.stride_token, first_row, warp_row, shape.key_length, shape.dim_v);
  return false;
}

// Apart from the first pass, whose registers it must not take; so it finds out for itself what the tile is.
template <class Config, KeySums kSums>
__device__ __noinline__ void repair_key_gradients(const BackwardKernelParams& p, typename Config::SharedStorage& s) {
  const KeyTile tile = describe_key_tile<Config>(p);
  sum_key_gradients<Config, kSums, true>(p, tile, s);
}

template <class Config, KeySums kSums>
__device__ __forceinline__ void make_key_gradients(const BackwardKernelParams& p, const KeyTile& tile,
                                                   typename Config::SharedStorage& s) {
  if (sum_key_gradients<Config, kSums, false>(p, tile, s)) repair_key_gradients<Config, kSums>(p, s);
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksAtOnce)
    flash_attention_backward_dkdv_kernel(const __grid_constant__ BackwardKernelParams p) {
  extern __shared__ __align__(128) unsigned char s_memory[];
  auto& s = *reinterpret_cast<typename Config::SharedStorage*>(s_memory);
  const KeyTile tile = describe_key_tile<Config>(p);
  const AttentionShape& shape = p.call.shape;
  const int first_row = tile.index * Config::kTileKey;
  Config::Key::template load<Config::kThreads>(
      ptx::shared_address(s.k), {head_of(p.call.k, tile.batch, tile.kv_head), p.call.k.stride_token, shape.dim_qk},
      first_row, shape.key_length);
  Config::Value::template load<Config::kThreads>(
      ptx::shared_address(s.v), {head_of(p.call.v, tile.batch, tile.kv_head), p.call.v.stride_token, shape.dim_v},
      first_row, shape.key_length);
  if constexpr (Config::kSumsTogether) {
    make_key_gradients<Config, KeySums::kBoth>(p, tile, s);
  } else {
    make_key_gradients<Config, KeySums::kGradKey>(p, tile, s);  // dK leaves through the memory of V
    make_key_gradients<Config, KeySums::kGradValue>(p, tile, s);
  }
}

}  // namespace selfattn::cuda::sm80
