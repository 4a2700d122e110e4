// Products with values of which some are NaN or infinite. The tensor cores take a key that is not visible as one of
// weight 0, and 0 times NaN is NaN. So what is not finite is taken out of the values, and a second product tells who
// meets it.
#pragma once
#include "flash/tile/constants.h"
#include "flash/tile/online_softmax.cuh"
#include "ptx/arithmetic.cuh"
#include "ptx/mma.cuh"
#include "ptx/transpose.cuh"

namespace selfattn::cuda::kv_cache {

template <class Element, class Operand>
__device__ __forceinline__ bool has_finite_values(const unsigned char* s_values) {
  ptx::FiniteTest<Element> finite;
#pragma unroll 1
  for (int i = threadIdx.x % kWarpSize; i < Operand::kRows * Operand::kChunks; i += kWarpSize) {
    const uint4 chunk =
        *reinterpret_cast<const uint4*>(s_values + Operand::place(i / Operand::kChunks, i % Operand::kChunks));
    finite.add(chunk.x), finite.add(chunk.y), finite.add(chunk.z), finite.add(chunk.w);
  }
  return __all_sync(~0u, finite.all_finite());
}

// Kinds of values as numbers, of which those of 16 keys can be added up: each is more than so many of the one before.
constexpr float kPlusInfinity = 1.f, kMinusInfinity = 128.f, kNaN = 16384.f;

__device__ __forceinline__ float kind_of(float value) {
  if (fabsf(value) < infinity()) return 0.f;
  return value == infinity() ? kPlusInfinity : value == -infinity() ? kMinusInfinity : kNaN;
}

template <class Element>
__device__ __forceinline__ uint32_t take_out_non_finite(uint32_t& packed) {
  const float2 values = ptx::unpack<Element>(packed), kinds = {kind_of(values.x), kind_of(values.y)};
  if (kinds.x != 0.f) packed &= 0xffff0000u;
  if (kinds.y != 0.f) packed &= 0x0000ffffu;
  return ptx::pack<Element>(kinds.x, kinds.y);
}

__device__ __forceinline__ float sum_of_kinds(float kinds) {
  if (kinds == 0.f) return 0.f;
  if (kinds >= kNaN) return infinity() - infinity();
  const bool has_minus = kinds >= kMinusInfinity, has_plus = static_cast<int>(kinds) % int(kMinusInfinity) != 0;
  return (has_plus ? infinity() : 0.f) - (has_minus ? infinity() : 0.f);
}

// out += A B, and what is not finite in it: of the weights' part in a product, whether they are 0 (met), and of the
// values' part the kinds.
template <class Element>
__device__ __forceinline__ void add_product(float* out, const uint32_t* a, const uint32_t* b, const uint32_t* met_a,
                                            const uint32_t* met_b) {
  float met[4], sum[4];
  ptx::multiply_overwrite<Element>(met, met_a, met_b[0], met_b[1]);
  ptx::multiply_overwrite<Element>(sum, a, b[0], b[1]);
#pragma unroll
  for (int i = 0; i < 4; i++) out[i] += sum[i] + sum_of_kinds(met[i]);
}

// out += P V of 16 rows; `weights` and `out` as mma's results are laid out. From OperandTile::left_place(values, 0).
template <class Element, class Operand, int kCount, int kOut>
__device__ __noinline__ void multiply_non_finite_values(uint32_t s_values, const float (&weights)[kCount],
                                                        float (&out)[kOut]) {
#pragma unroll 1
  for (int step = 0; step < kCount / 8; step++) {
    uint32_t a[4], is_met[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float low = weights[8 * step + 2 * i], high = weights[8 * step + 2 * i + 1];
      a[i] = ptx::pack<Element>(low, high);
      is_met[i] = ptx::pack<Element>(low != 0.f, high != 0.f);
    }
#pragma unroll 1
    for (int pair = 0; pair < kOut / 8; pair++) {
      uint32_t b[4], kinds[4];
      Operand::load_right_transposed(s_values, step, pair, b);
#pragma unroll
      for (int i = 0; i < 4; i++) kinds[i] = take_out_non_finite<Element>(b[i]);
#pragma unroll
      for (int half = 0; half < 2; half++)
        add_product<Element>(out + 8 * pair + 4 * half, a, b + 2 * half, is_met, kinds + 2 * half);
    }
  }
}

// Weights of 16 keys with 8 rows, laid out as a product that has the keys as its rows: the right operand of the next.
template <class Element>
__device__ __forceinline__ void take_weights(const float* weights, uint32_t (&b)[2]) {
#pragma unroll
  for (int i = 0; i < 2; i++) b[i] = ptx::transpose_matrix(ptx::pack<Element>(weights[2 * i], weights[2 * i + 1]));
}

// The same of 8 rows: out^T += V^T P^T (few_rows.cuh).
template <class Element, class Operand, int kCount, int kOut>
__device__ __noinline__ void multiply_non_finite_values_of_few_rows(uint32_t s_values, const float (&weights)[kCount],
                                                                    float (&out)[kOut]) {
#pragma unroll 1
  for (int step = 0; step < kCount / 4; step++) {
    float is_met_by[4];
#pragma unroll
    for (int i = 0; i < 4; i++) is_met_by[i] = weights[4 * step + i] != 0.f;
    uint32_t b[2], is_met[2];
    take_weights<Element>(weights + 4 * step, b), take_weights<Element>(is_met_by, is_met);
#pragma unroll 1
    for (int tile = 0; tile < kOut / 4; tile++) {
      uint32_t r[4], kinds[4];
      Operand::load_right_transposed(s_values, step, tile, r);
#pragma unroll
      for (int i = 0; i < 4; i++) kinds[i] = take_out_non_finite<Element>(r[i]);
      const uint32_t a[4] = {r[0], r[2], r[1], r[3]}, a_kinds[4] = {kinds[0], kinds[2], kinds[1], kinds[3]};
      add_product<Element>(out + 4 * tile, a, b, a_kinds, is_met);
    }
  }
}

}  // namespace selfattn::cuda::kv_cache
