// What the kernels know of a row of queries: lse, so that P = exp(logit - lse), and delta = rowsum(dO * O) - dlse, so
// that dS = P (dP - delta). They are computed by the kernel ahead (preprocess.cuh).
//
// The product of score and scale is rounded as the forward pass rounds it for lse, so that the difference of both is
// exactly 0 for a key that has all the weight.
//
// A pair whose P is 0 contributes nothing, whatever stands in its rows: exceptional.cuh says how.
#pragma once
#include "flash/float32/exceptional.cuh"
#include "flash/float32/softcap.cuh"

namespace selfattn::cuda::float32 {

struct RowStats {
  float lse, delta;
};

// Of a row with this lse and this rowsum(dO * O) - dlse. Rows that see no key, or whose sink has all the weight, and
// those past the end (lse -inf) get infinity, which makes each P of theirs 0; a row whose results are not finite gets
// NaN.
__device__ __forceinline__ RowStats make_row_stats(float lse, float delta) {
  if (fabsf(lse) == infinity()) return {infinity(), 0.f};
  if (!(fabsf(lse) < infinity()) || !(fabsf(delta) < infinity())) return {NAN, 0.f};
  return {lse, delta};
}

// Of P, to the base 2.
__device__ __forceinline__ float exponent(float score, float scale, float lse) {
  return (__fmul_rn(score, scale) - lse) * kLog2E;
}

// capped: the score behind the softcap, or 0.
template <bool kIsRepair>
__device__ __forceinline__ float score_gradient(float weight, float dp, float delta, float capped) {
  if (kIsRepair && weight == 0.f) return 0.f;
  return weight * (dp - delta) * fmaf(-capped, capped, 1.f);
}

}  // namespace selfattn::cuda::float32
