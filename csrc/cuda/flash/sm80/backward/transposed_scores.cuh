// S^T and dP^T of a warp: keys are rows, queries columns. The kernels that sum dK and dV have them in common. A lane
// holds kGroups groups of 16 keys (mma.cuh), and of every eight queries two neighbours; their statistics are read from
// shared memory, from those of the lane's first query on.
#pragma once
#include "flash/tile/mask.cuh"
#include "key_tile.cuh"
#include "row_stats.cuh"

namespace selfattn::cuda::sm80 {

// finish(g, pair, scores, first, second): `scores` points at the two scores of pair `pair` of group g, as pack_left
// counts them; first and second are their exponents of P. lse_of(column) reads lse of a query with large logits,
// counted from the lane's first.
template <bool kIsCareful, int kGroups, int kCount, class LseOf, class Finish>
__device__ __forceinline__ void take_exponents(float (&scores)[kGroups][kCount], const float* s_lse_log2, float scale,
                                               const LseOf& lse_of, const Finish& finish) {
  const float scale_log2 = scale * kLog2E;
#pragma unroll
  for (int i = 0; i < kCount / 4; i++) {
    const float2 lse_log2 = *reinterpret_cast<const float2*>(s_lse_log2 + 8 * i);
    const bool is_first_exact = kIsCareful && is_large(lse_log2.x),
               is_second_exact = kIsCareful && is_large(lse_log2.y);
    const float first_lse = is_first_exact ? lse_of(8 * i) : 0.f,
                second_lse = is_second_exact ? lse_of(8 * i + 1) : 0.f;
#pragma unroll
    for (int g = 0; g < kGroups; g++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float* pair = scores[g] + 4 * i + 2 * r;
        finish(
            g, 2 * i + r, pair,
            is_first_exact ? exact_exponent(pair[0], scale, first_lse) : exponent(pair[0], scale_log2, lse_log2.x),
            is_second_exact ? exact_exponent(pair[1], scale, second_lse) : exponent(pair[1], scale_log2, lse_log2.y));
      }
  }
}

// Scores become exponents of P.
template <bool kIsCareful, int kGroups, int kCount, class LseOf>
__device__ __forceinline__ void take_exponents(float (&scores)[kGroups][kCount], const float* s_lse_log2, float scale,
                                               const LseOf& lse_of) {
  take_exponents<kIsCareful>(scores, s_lse_log2, scale, lse_of, [](int, int, float* pair, float first, float second) {
    pair[0] = first, pair[1] = second;
  });
}

// With softcap: scores become slope weights, and P is packed (softcap.cuh).
template <class Element, bool kIsCareful, int kGroups, int kCount, class LseOf>
__device__ __forceinline__ void take_capped_weights(float (&scores)[kGroups][kCount],
                                                    uint32_t (&packed)[kGroups][kCount / 2], const float* s_lse_log2,
                                                    float cap, const LseOf& lse_of) {
  take_exponents<kIsCareful>(scores, s_lse_log2, cap, lse_of,
                             [&](int g, int at, float* pair, float first, float second) {
                               const float weight = take_weight(pair[0], first);
                               packed[g][at] = ptx::pack<Element>(weight, take_weight(pair[1], second));
                             });
}

// -inf where a pair is masked. first_key: the lane's first row; first_query: its first column.
template <int kGroups, int kCount>
__device__ __forceinline__ void mask_keys(float (&scores)[kGroups][kCount], const BackwardParams& call,
                                          const KeyTile& tile, int first_key, int first_query, bool is_cut,
                                          bool by_ids) {
  const SegmentTables& segments = call.segments;
  const auto queries_of = [&](int key) {
    const Interval queries =
        visible_queries(call, tile.batch, tile.segments.has_runs, min(key, call.shape.key_length - 1));
    return key < call.shape.key_length ? queries : Interval{0, 0};
  };
#pragma unroll
  for (int g = 0; g < kGroups; g++) {
    const int key = first_key + 16 * g;
    if (is_cut) {
      const Interval queries[2] = {queries_of(key), queries_of(key + 8)};
      mask_by_intervals<true>(scores[g], queries, first_query);
    }
    if (by_ids) {
      const int* g_ids = segments.key_ids + int64_t(tile.batch) * segments.pitch_key + key;
      const int ids[2] = {g_ids[0], g_ids[8]};
      mask_by_ids(scores[g], ids, segments.query_ids + int64_t(tile.batch) * segments.pitch_query + first_query);
    }
  }
}

template <int kGroups, int kCount>
__device__ __forceinline__ void exponentiate(float (&exponents)[kGroups][kCount]) {
#pragma unroll
  for (int g = 0; g < kGroups; g++)
#pragma unroll
    for (int i = 0; i < kCount; i++) exponents[g][i] = ptx::exp2_approx(exponents[g][i]);
}

// P, or slope weights, become dS. kIsCareful: 0 where the weight is, whatever dP is.
template <bool kIsCareful, int kGroups, int kCount>
__device__ __forceinline__ void take_score_gradients(float (&weights)[kGroups][kCount],
                                                     const float (&dp)[kGroups][kCount], const float* s_delta) {
#pragma unroll
  for (int i = 0; i < kCount / 4; i++) {
    const float2 delta = *reinterpret_cast<const float2*>(s_delta + 8 * i);
#pragma unroll
    for (int g = 0; g < kGroups; g++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float& x = weights[g][4 * i + j];
        x = score_gradient<kIsCareful>(x, dp[g][4 * i + j], j % 2 ? delta.y : delta.x);
      }
  }
}

}  // namespace selfattn::cuda::sm80
