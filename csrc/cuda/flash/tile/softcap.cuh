// Softcap: a scaled score x becomes the logit cap * tanh(x / cap).
//
// In the backward pass scores are replaced by tanh(scale * score / cap) as soon as they are there, ahead of every mask.
// From then on a kernel with softcap goes on as one without: its "scores" are between -1 and 1, and its "scale" is the
// cap. The forward pass makes its exponents of the same polynomial without a tanh in between (capped_softmax.cuh).
//
// A score that is not finite gives NaN, as it does to the row of a kernel without softcap. Of an infinite one the
// formula would make +-cap, and nothing in out and lse would tell any more that there is a NaN or an infinity in q or
// k, which is what the backward pass keeps documents apart by (exceptional.cuh).
//
// The tanh is right to 8e-7 of itself, near 0 and far from it: where a cap is so large that it hardly caps, the logits
// must keep the digits that they have without it. A logit of the kernels' innermost loop has about 20 instructions'
// worth of time, and its exp2 takes half of what the special function unit can do beside the tensor cores. What was
// weighed:
//   - tanh.approx.f32, one special function: its error of 2^-11 is 0.015 in a logit of 30, three to ten times the error
//     of P's rounding to bfloat16 in the output, and 0.01 in lse. Too much.
//   - 1 - 2 / (exp2(2 x log2(e)) + 1), two special functions: right far from 0, but near 0 its absolute error of 2e-7
//     is multiplied by the cap; and three special functions a logit take longer than its products.
//   - A rational function on the whole line: one special function, and 12 to 14 instructions.
//   - A polynomial, where |x / cap| < 3/4: 7.5 instructions and no special function, 6.5 in the forward pass. This is
//     what nearly all scores of a trained model want. A warp that meets a larger one takes the exponential for it, and
//     its time.
//   - One term less: 5e-7 where |x / cap| < 1/2, but 1.1e-5 up to 3/4. A choice of the degree by what a warp meets
//     would let other documents' scores change a logit's last bits.
#pragma once
#include <algorithm>
#include <limits>

#include "constants.h"
#include "online_softmax.cuh"
#include "ptx/arithmetic.cuh"

namespace selfattn::cuda {

// Made on the host. y stands for x / cap = kUnit * y, so that whether |x / cap| is below 3/4 shows in one bit of y.
struct Softcap {
  float cap;
  float cap_log2;  // cap * log2(e)
  float factor;    // of a score, for its y

  // Of kernels without softcap (cap 0) nothing is read.
  static Softcap of(float scale, float cap) {
    constexpr float kLargest = 0x1p64f;  // with no score that counts small or infinite
    return {cap, cap * kLog2E, cap > 0.f ? std::min(scale / kUnit / cap, kLargest) : 0.f};
  }

  // By a whole warp. Returns whether all scores of this lane are finite.
  template <int kCount>
  __device__ __forceinline__ bool apply(float (&scores)[kCount]) const {
    uint32_t bits = 0;
    bool all_finite = true;
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      scores[i] *= factor;
      bits |= __float_as_uint(scores[i]);
    }
    if (__any_sync(~0u, bits & kBitOfLarge)) [[unlikely]] {
      // Scores go round in a loop: unrolled this is more code than all the rest of a step, for the step to jump over.
      constexpr int kGroup = 8;
      static_assert(kCount % kGroup == 0);
#pragma unroll 1
      for (int first = 0; first < kCount; first += kGroup) {
        float group[kGroup];
#pragma unroll
        for (int i = 0; i < kGroup; i++) {
          all_finite &= fabsf(scores[i]) < kInfinity;
          group[i] = fabsf(scores[i]) < kFirstLarge ? tanh_of_small(scores[i]) : tanh_of_large(scores[i]);
        }
#pragma unroll
        for (int i = 0; i < kCount; i++) scores[i] = i < kCount - kGroup ? scores[i + kGroup] : group[i % kGroup];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i++) scores[i] = tanh_of_small(scores[i]);
    }
    return all_finite;
  }

 protected:
  static constexpr float kUnit = 0.375f, kFirstLarge = 2.f, kInfinity = std::numeric_limits<float>::infinity();
  static constexpr uint32_t kBitOfLarge = 0x40000000u;  // set from 2 on, in infinity and in NaN
  // y * (kUnit + y^2 (k1 + y^2 (..))): the minimax polynomial of the relative error, with the slope at 0 exact.
  static constexpr float k1 = -1.7576192e-2f, k2 = 9.8394218e-4f, k3 = -5.2432002e-5f, k4 = 1.9219674e-6f;

  static __device__ __forceinline__ float tanh_of_small(float y) {
    const float square = y * y;
    float p = fmaf(square, k4, k3);
    p = fmaf(p, square, k2);
    p = fmaf(p, square, k1);
    p = fmaf(p, square, kUnit);
    return __fmul_rn(y, p);  // never fused with what follows: the same bits in every kernel
  }
  // +-1 where exp2 is infinity or 0.
  static __device__ __forceinline__ float tanh_of_large(float y) {
    const float power = ptx::exp2_approx(y * (2.f * kUnit * kLog2E));
    return fmaf(-2.f, ptx::reciprocal_approx(1.f + fmaf(y, 0.f, power)), 1.f);  // infinity times 0 is NaN
  }
};

// Backward. Both P = exp2(t * cap * log2(e) - lse * log2(e)) and dS = P (1 - t^2) (dP - delta) want t, and no registers
// are left to keep it. So P is taken, and packed for dV at once, and over t comes the slope weight P (1 - t^2). Masks
// come behind: P is 0 of a pair that is not allowed and of many others, which leaves nothing to tell their t from.
// Before it is masked, the weight of a pair may be anything.

// P of a pair; its slope weight over its t.
__device__ __forceinline__ float take_weight(float& t, float exponent) {
  const float weight = ptx::exp2_approx(exponent), square = t * t;
  t = fmaf(-square, weight, weight);
  return weight;
}

// What a mask has set to -inf becomes 0, in P too.
template <int kCount>
__device__ __forceinline__ void clear_masked(float (&slope_weights)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++)
    if (slope_weights[i] == -infinity()) slope_weights[i] = 0.f;
}

template <int kCount>
__device__ __forceinline__ void clear_masked(float (&slope_weights)[kCount], uint32_t (&packed)[kCount / 2]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; i++) {
    if (slope_weights[2 * i] == -infinity()) packed[i] &= 0xffff0000u;
    if (slope_weights[2 * i + 1] == -infinity()) packed[i] &= 0x0000ffffu;
  }
  clear_masked(slope_weights);
}

}  // namespace selfattn::cuda
