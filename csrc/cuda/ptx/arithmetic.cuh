// Single-instruction arithmetic without a CUDA C++ spelling of its own.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace selfattn::ptx {

// 2^x; 2^-inf = 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to Element and packed, `low` in the lower half.
template <class Element>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// The two elements as floats, the lower half first.
template <class Element>
__device__ __forceinline__ float2 unpack(uint32_t packed);

template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t packed) {
  return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u)};
}

template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t packed) {
  return __half22float2(*reinterpret_cast<const __half2*>(&packed));
}

// Whether all of many packed pairs are finite, at one instruction a pair: 0 times NaN or infinity is NaN, and NaN
// stays.
template <class Element>
struct FiniteTest {
  uint32_t sum = 0;  // two zeros as long as it holds

  __device__ __forceinline__ void add(uint32_t packed);
  __device__ __forceinline__ bool all_finite() const { return (sum & 0x7fff7fffu) == 0; }
};

template <>
__device__ __forceinline__ void FiniteTest<__nv_bfloat16>::add(uint32_t packed) {
  asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(packed), "r"(0));
}

template <>
__device__ __forceinline__ void FiniteTest<__half>::add(uint32_t packed) {
  asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(packed), "r"(0));
}

}  // namespace selfattn::ptx
