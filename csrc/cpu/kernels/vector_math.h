#pragma once

// Vectors of float, through ATen's, for the instruction set that the file is compiled for.
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <limits>

namespace selfattn::cpu {
inline namespace CPU_CAPABILITY {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kLog2e = 1.4426950408889634f;

inline Vec load(const float* p) { return Vec::loadu(p); }

/// 2^x of x <= 127, within 2 ulp; exactly 0 where x is -inf; NaN stays NaN.
inline Vec exp2(Vec x) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2) || defined(__aarch64__)
  // 2^x = 2^n * 2^f, n the nearest integer, 2^f a polynomial (minimax on [-1/2, 1/2] with 2^0 = 1, error 9e-8).
  constexpr float c0 = 1.0f, c1 = 0.693147004f, c2 = 0.240222424f, c3 = 0.0555073359f, c4 = 0.00967151299f,
                  c5 = 0.00132647261f;
#if defined(CPU_CAPABILITY_AVX512)
  const Vec y = _mm512_max_ps(_mm512_set1_ps(-160.0f), x);  // 2^-160 rounds to 0; a NaN in the second place stays
#elif defined(CPU_CAPABILITY_AVX2)
  const Vec y = _mm256_min_ps(_mm256_set1_ps(127.0f), _mm256_max_ps(_mm256_set1_ps(-127.0f), x));
#else
  const Vec y = vminq_f32(vmaxq_f32(x, vdupq_n_f32(-127.0f)), vdupq_n_f32(127.0f));  // NEON keeps a NaN in either place
#endif
  const Vec n = y.round(), f = y - n;
  Vec p = at::vec::fmadd(Vec(c5), f, Vec(c4));
  p = at::vec::fmadd(p, f, Vec(c3));
  p = at::vec::fmadd(p, f, Vec(c2));
  p = at::vec::fmadd(p, f, Vec(c1));
  p = at::vec::fmadd(p, f, Vec(c0));
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_scalef_ps(p, n);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));  // n = -127 gives 0
  return p * Vec(_mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
#else
  const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
  return p * Vec(vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
#endif
#else
  return x.exp2();
#endif
}

/// The larger of two; where an element is NaN, either.
inline Vec larger(Vec a, Vec b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_max_ps(a, b);
#else
  return at::vec::maximum(a, b);
#endif
}

inline float sum(Vec x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, x);
}

inline float largest(Vec x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return larger(a, b); }, x);
}

template <typename T>
float dot(const T* a, const T* b, int64_t count) {
  Vec r_sum(0.0f);
  int64_t i = 0;
  if constexpr (std::is_same_v<T, float>) {
    for (; i + kLanes <= count; i += kLanes) r_sum = at::vec::fmadd(load(a + i), load(b + i), r_sum);
  } else {
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
      const auto [a_low, a_high] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(a + i));
      const auto [b_low, b_high] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(b + i));
      r_sum = at::vec::fmadd(a_low, b_low, at::vec::fmadd(a_high, b_high, r_sum));
    }
  }
  float total = sum(r_sum);
  for (; i < count; ++i) total += static_cast<float>(a[i]) * static_cast<float>(b[i]);
  return total;
}

/// dst[0, count) = src, converted.
inline void convert(const float* src, float* dst, int64_t count) { std::copy_n(src, count, dst); }

template <typename T>
void convert(const T* src, float* dst, int64_t count) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const auto [low, high] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(src + i));
    low.store(dst + i);
    high.store(dst + i + kLanes);
  }
  for (; i < count; ++i) dst[i] = static_cast<float>(src[i]);
}

/// dst[0, count) = factor * src, converted.
template <typename T>
void convert_scaled(const float* src, float factor, T* dst, int64_t count) {
  int64_t i = 0;
  const Vec scale(factor);
  if constexpr (std::is_same_v<T, float>) {
    for (; i + kLanes <= count; i += kLanes) (load(src + i) * scale).store(dst + i);
  } else {
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
      at::vec::convert_from_float<T>(load(src + i) * scale, load(src + i + kLanes) * scale).store(dst + i);
    }
  }
  for (; i < count; ++i) dst[i] = static_cast<T>(src[i] * factor);
}

}  // namespace CPU_CAPABILITY
}  // namespace selfattn::cpu
