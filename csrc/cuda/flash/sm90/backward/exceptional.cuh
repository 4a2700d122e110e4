// What the backward kernels do about rows out of the ordinary: logits so large that float32 has few bits left for their
// differences, and NaN or infinity in rows that others may not attend to.
//
// Large logits. The exponent of P, score * c - lse * log2(e), has the rounding of its last term, half an ulp of a large
// number. From kFirstExactStat on it is taken again: score * scale is rounded as the forward pass rounded it for lse,
// so that the difference from lse is exactly 0 for a key that has all the weight. The score itself is gone by then, but
// the exponent is an exact difference up to its own last bit, which in float64 gives it back.
//
// Isolation. A masked pair has P = 0, and three sums would multiply it by what stands in the other token's row:
//   dV_j += P_ij dO_i    dK_j += dS_ij Q_i    dQ_i += dS_ij K_j    with    dS_ij = P_ij (dP_ij - delta_i)
// A query i whose Q, dO or O is not finite, or that may attend to a key that is not, has lse or delta not finite; its
// statistic is NaN then, so that P and dS are NaN for every pair that is allowed, whatever its rows hold. A query that
// attends to nothing has infinity there, and P = 0. The rows of both kinds can thus be cleared where a block is masked,
// and so can those of a key that is not finite: whoever may attend to it has NaN for a statistic. Masked pairs are then
// left with dP alone: their dS is made 0.
//
// How it is found out. The single-pass form adds to dQ as it goes, so every block must be right at once: the producer
// warp looks at the statistics of its rows and flags it (kExceptionalRows), and every masked block asks two questions
// about its keys. The two-pass form computes its tiles a second time where it must (repair_list.cuh), and looks at
// results only. Its kernel for dQ sees what went wrong in dQ; it also gives delta NaN to queries that are not finite or
// whose Q is not, so that no dS of theirs is finite and all of a key's row of dK shows it; and says whether there are
// exact statistics, on which the kernel for dK and dV makes all of its tiles with care.
#pragma once
#include "config.cuh"
#include "flash/sm90/operand_rows.cuh"
#include "flash/tile/online_softmax.cuh"
#include "ptx/arithmetic.cuh"
#include "ptx/fence.cuh"
#include "schedule.cuh"

namespace selfattn::cuda::sm90 {

constexpr float kFirstExactStat = kExactFrom;

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < infinity(); }

__device__ __forceinline__ bool is_exact_stat(float stat) { return fabsf(stat) >= kFirstExactStat && is_finite(stat); }

// lse * log2(e) of a row with finite lse, kept finite.
__device__ __forceinline__ float finite_stat(float lse) {
  constexpr float kLargest = 3.4028234e38f;
  return fminf(fmaxf(lse * kLog2E, -kLargest), kLargest);
}

// The better exponent of a row with an exact statistic.
__device__ __forceinline__ float exact_exponent(const BackwardSchedule& schedule, float exponent, float stat,
                                                float lse) {
  const double logit = (static_cast<double>(exponent) + static_cast<double>(stat)) * schedule.logit_of_exponent;
  return (__double2float_rn(logit) - lse) * kLog2E;
}

// Where the statistic of row `row` of a block stands among those of the block.
__device__ __forceinline__ int stat_index(int row) { return row / kStatRows * kStatFloats + row % kStatRows; }

// The exponents of P in a block whose rows are keys and whose columns are kColumns queries; s_stats from this lane's
// first column on.
template <int kColumns>
__device__ __forceinline__ void take_exponents(float (&scores)[kColumns / 2], const float* s_stats, float scale_log2) {
#pragma unroll
  for (int i = 0; i < kColumns / 2; i += 4) {
    const float2 stats = *reinterpret_cast<const float2*>(s_stats + stat_index(2 * i));
    scores[i] = fmaf(scores[i], scale_log2, -stats.x), scores[i + 1] = fmaf(scores[i + 1], scale_log2, -stats.y);
    scores[i + 2] = fmaf(scores[i + 2], scale_log2, -stats.x),
               scores[i + 3] = fmaf(scores[i + 3], scale_log2, -stats.y);
  }
}

// dS = P (dP - delta) of such a block, rounded and packed. kSkipsMasked: where P is 0 so is dS, whatever dP is.
template <class Element, int kColumns, bool kSkipsMasked = false>
__device__ __forceinline__ void pack_score_gradients(const float (&weights)[kColumns / 2],
                                                     const float (&dp)[kColumns / 2], const float* s_stats,
                                                     uint32_t (&packed)[kColumns / 4]) {
  const auto gradient = [&](int i, float delta) {
    return kSkipsMasked && weights[i] == 0.f ? 0.f : weights[i] * (dp[i] - delta);
  };
#pragma unroll
  for (int i = 0; i < kColumns / 8; i++) {
    const float2 delta = *reinterpret_cast<const float2*>(s_stats + kStatRows + stat_index(8 * i));
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int at = 4 * i + 2 * r;
      packed[2 * i + r] = ptx::pack<Element>(gradient(at, delta.x), gradient(at + 1, delta.y));
    }
  }
}

// The exponents of columns with exact statistics, behind take_exponents. first_query: this lane's first column. The
// exponents go round in a loop instead of being unrolled: what the main loop has to jump over costs it time, executed
// or not.
template <int kColumns>
__device__ __forceinline__ void refine_exponents(float (&exponents)[kColumns / 2], const BackwardParams& p,
                                                 const BackwardSchedule& schedule, const float* s_stats, int head,
                                                 int first_query) {
  constexpr int kGroup = 4;  // two columns of two rows
  const float* g_lse = p.lse + int64_t(head) * p.shape.query_length + first_query;
#pragma unroll 1
  for (int column = 0; column < kColumns; column += 8) {
    float group[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; i++) group[i] = exponents[i];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const float stat = s_stats[stat_index(column) + j];
      if (!is_exact_stat(stat)) continue;
      const float lse = g_lse[column + j];
      group[j] = exact_exponent(schedule, group[j], stat, lse),
      group[2 + j] = exact_exponent(schedule, group[2 + j], stat, lse);
    }
#pragma unroll
    for (int i = 0; i < kColumns / 2; i++)
      exponents[i] = i < kColumns / 2 - kGroup ? exponents[i + kGroup] : group[i % kGroup];
  }
}

// A lane's share of the statistics of a tile of queries, out of global memory.
template <int kRows>
struct BlockStats {
  float2 of_lane[kRows / kStatRows];

  __device__ __forceinline__ explicit BlockStats(const float* g_stats) {
#pragma unroll
    for (int i = 0; i < kRows / kStatRows; i++)
      of_lane[i] = *reinterpret_cast<const float2*>(g_stats + i * kStatFloats + 2 * (threadIdx.x % 32));
  }

  // Whether some row has a statistic that is not finite, or exact. By a warp.
  __device__ __forceinline__ bool has_exceptional_rows() const {
    bool is_ordinary = true;
#pragma unroll
    for (const float2& stats : of_lane)  // the comparisons are false of NaN, too
      is_ordinary &= fabsf(stats.x) < kFirstExactStat && fabsf(stats.y) < kFirstExactStat;
    return __any_sync(~0u, !is_ordinary);
  }
};

// Stands in for them where a second pass cares for such rows.
struct OrdinaryStats {
  __device__ __forceinline__ explicit OrdinaryStats(const float*) {}
  __device__ __forceinline__ bool has_exceptional_rows() const { return false; }
};

// Whether one of a lane's two products of whole rows came out non-finite. Both rows of a pair must be finite for a
// finite product, so one column tells of all rows.
__device__ __forceinline__ bool is_any_non_finite(float x, float y) { return !is_finite(x) || !is_finite(y); }

// The rows of Q and dO with no finite statistic. Every warp does it for itself before it multiplies them, so that none
// need wait for another.
template <int kRows, int kPanels, int kPanelBytes>
__device__ __forceinline__ void clear_queries(unsigned char* s_q, unsigned char* s_grad_out, const float* s_stats) {
#pragma unroll 1
  for (int base = 0; base < kRows; base += 32) {
    const bool is_bad = !is_finite(s_stats[stat_index(base + threadIdx.x % 32)]);
#pragma unroll 1
    for (unsigned left = __ballot_sync(~0u, is_bad); left; left &= left - 1) {
      const int row = base + __ffs(left) - 1;
      clear_row<kPanels, kPanelBytes>(s_q, row);
      clear_row<kPanels, kPanelBytes>(s_grad_out, row);
    }
  }
  ptx::fence_proxy_async_shared();
  __syncwarp();
}

// Rows [first, first + kRows) of K.
template <class Element, int kRows, int kPanels, int kPanelBytes>
__device__ __forceinline__ void clear_keys(unsigned char* s_k, int first) {
#pragma unroll 1
  for (int row = first; row < first + kRows; row++)
    if (!is_row_finite<Element, kPanels, kPanelBytes>(s_k, row)) clear_row<kPanels, kPanelBytes>(s_k, row);
  ptx::fence_proxy_async_shared();
  __syncwarp();
}

// dP of pairs without weight, so that dS = P (dP - delta) is 0 there.
template <int kCount>
__device__ __forceinline__ void clear_products_without_weight(const float (&weights)[kCount], float (&dp)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++)
    if (weights[i] == 0.f) dp[i] = 0.f;
}

}  // namespace selfattn::cuda::sm90
