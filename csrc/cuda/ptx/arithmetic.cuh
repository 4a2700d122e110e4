// Single-instruction arithmetic without a CUDA C++ spelling of its own.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace selfattn::ptx {

// 2^x; 2^-inf = 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x; of infinity 0.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to Element and packed, `low` in the lower half.
template <class Element>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
#if __CUDA_ARCH__ >= 800
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  const __nv_bfloat162 packed = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(packed);
#endif
}

template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
#if __CUDA_ARCH__ >= 800
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  const __half2 packed = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(packed);
#endif
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

// d += a * b in both halves, in Element's precision.
template <class Element>
__device__ __forceinline__ void fma_packed(uint32_t& d, uint32_t a, uint32_t b);

template <>
__device__ __forceinline__ void fma_packed<__nv_bfloat16>(uint32_t& d, uint32_t a, uint32_t b) {
  asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(d) : "r"(a), "r"(b));
}

template <>
__device__ __forceinline__ void fma_packed<__half>(uint32_t& d, uint32_t a, uint32_t b) {
  asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(d) : "r"(a), "r"(b));
}

// Whether all of many packed elements are finite: products and sums with NaN or infinity are not.
template <class Element>
struct FiniteTest {
  static constexpr bool kHasRangeOfFloat = std::is_same_v<Element, __nv_bfloat16>;
  uint32_t sum = 0;

  __device__ __forceinline__ void add(uint32_t packed) { fma_packed<Element>(sum, packed, 0); }

  // Two at the price of one, where a false alarm may be raised: by products beyond 1e38.
  __device__ __forceinline__ void add_roughly(uint32_t packed, uint32_t other) {
    if (kHasRangeOfFloat)
      fma_packed<Element>(sum, packed, other);
    else
      add(packed), add(other);
  }

  __device__ __forceinline__ bool all_finite() const {
    constexpr uint32_t kExponent = kHasRangeOfFloat ? 0x7f80u : 0x7c00u;
    return (sum & kExponent) != kExponent && (sum >> 16 & kExponent) != kExponent;
  }
};

}  // namespace selfattn::ptx
