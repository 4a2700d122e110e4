// The weights of a block with softcap, P and P (1 - t^2) (flash/tile/softcap.cuh), for the kernels whose P goes into
// dV.
#pragma once
#include "exceptional.cuh"
#include "flash/tile/softcap.cuh"
#include "ptx/arithmetic.cuh"

namespace selfattn::cuda::sm90 {

// As exact_exponent, out of t: its logit is rounded as the forward pass rounded it.
__device__ __forceinline__ float exact_exponent_of_capped(float t, float cap, float lse) {
  return (__fmul_rn(t, cap) - lse) * kLog2E;
}

// Of a block whose rows are keys and whose columns are kColumns queries; s_stats from this lane's first column on.
template <class Element, int kColumns>
__device__ __forceinline__ void weigh_capped(float (&scores)[kColumns / 2], uint32_t (&packed)[kColumns / 4],
                                             const Softcap& softcap, const float* s_stats) {
#pragma unroll
  for (int i = 0; i < kColumns / 2; i += 4) {
    const float2 stats = *reinterpret_cast<const float2*>(s_stats + stat_index(2 * i));
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float &first = scores[i + 2 * r], &second = scores[i + 2 * r + 1];
      const float weight = take_weight(first, fmaf(first, softcap.cap_log2, -stats.x));
      packed[i / 2 + r] = ptx::pack<Element>(weight, take_weight(second, fmaf(second, softcap.cap_log2, -stats.y)));
    }
  }
}

// The same where some columns have exact statistics. In a loop as refine_exponents, for the same reason; first_query:
// this lane's first column.
template <class Element, int kColumns>
__device__ __forceinline__ void weigh_capped_exactly(float (&scores)[kColumns / 2], uint32_t (&packed)[kColumns / 4],
                                                     const BackwardParams& p, const Softcap& softcap,
                                                     const float* s_stats, int head, int first_query) {
  constexpr int kGroup = 4, kPairs = kGroup / 2;  // two columns of two rows
  const float* g_lse = p.lse + int64_t(head) * p.shape.query_length + first_query;
#pragma unroll 1
  for (int column = 0; column < kColumns; column += 8) {
    float group[kGroup], weights[kGroup];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const float stat = s_stats[stat_index(column) + j];
      const bool is_exact = is_exact_stat(stat);
      const float lse = is_exact ? g_lse[column + j] : 0.f;
#pragma unroll
      for (int i = j; i < kGroup; i += 2) {
        group[i] = scores[i];
        weights[i] = take_weight(group[i], is_exact ? exact_exponent_of_capped(scores[i], softcap.cap, lse)
                                                    : fmaf(scores[i], softcap.cap_log2, -stat));
      }
    }
    const uint32_t pairs[kPairs] = {ptx::pack<Element>(weights[0], weights[1]),
                                    ptx::pack<Element>(weights[2], weights[3])};
#pragma unroll
    for (int i = 0; i < kColumns / 2; i++)
      scores[i] = i < kColumns / 2 - kGroup ? scores[i + kGroup] : group[i % kGroup];
#pragma unroll
    for (int i = 0; i < kColumns / 4; i++)
      packed[i] = i < kColumns / 4 - kPairs ? packed[i + kPairs] : pairs[i % kPairs];
  }
}

}  // namespace selfattn::cuda::sm90
