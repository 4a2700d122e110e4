// Float32 products on tensor cores, whose operands have 11 significant bits (tf32).
//
// kTf32: operands rounded to tf32, one product. kIeee: an operand is split, x = big + small, and of (a_big + a_small)
// (b_big + b_small) the three larger terms are multiplied, the small ones first. What is left out is below 2^-22 of the
// product, and small's own bits past tf32 below 2^-23. Tensor cores cut off what does not fit their sums instead of
// rounding it, which adds up over long sums; so each sum of 16 products begins at zero, and the rounded additions of
// ordinary arithmetic put these together.
#pragma once
#include <cstdint>

#include "precision.h"
#include "ptx/mma_tf32.cuh"

namespace selfattn::cuda::float32 {

// Where the rounding below overflows, and what is not finite. The first pass of the kernels makes NaN or infinity of
// it; the repair pass multiplies it by ordinary arithmetic (exceptional.cuh).
constexpr float kSmallestExceptional = 0x1p114f;
__device__ __forceinline__ bool is_exceptional(float x) { return !(fabsf(x) < kSmallestExceptional); }

// To the nearest tf32. 8193 x rounded to a float is a multiple of 2^13 ulps of x, as is 8192 x. (cvt.rna.tf32.f32 is
// four instructions that run at half the rate of these two.)
__device__ __forceinline__ float round_to_tf32(float x) { return fmaf(x, -8192.f, __fmul_rn(x, 8193.f)); }

// kCount elements of one operand.
template <Precision kPrecision, int kCount>
struct Fragment {
  static constexpr bool kIsSplit = kPrecision == Precision::kIeee;
  uint32_t big[kCount], small[kIsSplit ? kCount : 1];

  __device__ __forceinline__ void set(int i, float x) {
    const float rounded = round_to_tf32(x);
    big[i] = __float_as_uint(rounded);
    if (kIsSplit) small[i] = __float_as_uint(x - rounded);
  }
  // Of an element that was rounded before, if it has to be.
  __device__ __forceinline__ void set_prepared(int i, float x) {
    if (kIsSplit)
      set(i, x);
    else
      big[i] = __float_as_uint(x);
  }
};

// sum += a b over kSteps steps of 8. kIsTransposed: the small terms change places, so that a transposed product has the
// same bits.
template <Precision kPrecision, int kSteps, bool kIsTransposed>
__device__ __forceinline__ void add_product(float* sum, const Fragment<kPrecision, 4 * kSteps>& a,
                                            const Fragment<kPrecision, 2 * kSteps>& b) {
  if constexpr (kPrecision == Precision::kTf32) {
#pragma unroll
    for (int s = 0; s < kSteps; s++) ptx::multiply_tf32(sum, a.big + 4 * s, b.big[2 * s], b.big[2 * s + 1]);
  } else {
    float part[4];
#pragma unroll
    for (int s = 0; s < kSteps; s++) {
      const uint32_t *first = kIsTransposed ? a.big : a.small, *second = kIsTransposed ? a.small : a.big;
      const uint32_t *of_first = kIsTransposed ? b.small : b.big, *of_second = kIsTransposed ? b.big : b.small;
      if (s == 0)
        ptx::begin_multiply_tf32(part, first, of_first[0], of_first[1]);
      else
        ptx::multiply_tf32(part, first + 4 * s, of_first[2 * s], of_first[2 * s + 1]);
      ptx::multiply_tf32(part, second + 4 * s, of_second[2 * s], of_second[2 * s + 1]);
    }
#pragma unroll
    for (int s = 0; s < kSteps; s++) ptx::multiply_tf32(part, a.big + 4 * s, b.big[2 * s], b.big[2 * s + 1]);
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] += part[i];
  }
}

}  // namespace selfattn::cuda::float32
