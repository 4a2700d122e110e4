#pragma once

// Products of a few query rows with the rows of a cache, read where they lie.
#include <algorithm>

#include "cpu/kernels/pack.h"

namespace selfattn::cpu {
inline namespace CPU_CAPABILITY {

/// Vec without its constructor, which would zero arrays of sums in memory before they become registers.
#if defined(CPU_CAPABILITY_AVX512)
using Register = __m512;
#elif defined(CPU_CAPABILITY_AVX2)
using Register = __m256;
#else
using Register = Vec;
#endif

/// kLanes elements as floats, or the first `count`, the others zeros: what lies behind is not read.
template <typename T>
Vec load_floats(const T* p) {
  if constexpr (std::is_same_v<T, float>) return Vec::loadu(p);
#if defined(CPU_CAPABILITY_AVX512)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if constexpr (std::is_same_v<T, c10::Half>) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  if constexpr (std::is_same_v<T, c10::Half>) return _mm256_cvtph_ps(bits);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
#else
  alignas(64) float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(p[i]);
  return Vec::loadu(lanes);
#endif
}

template <typename T>
Vec load_floats(const T* p, int64_t count) {
  alignas(64) T elements[kLanes] = {};
  std::copy_n(p, count, elements);
  return load_floats(elements);
}

/// Lane i of the result: the sum of x[i]'s lanes, all in the same order of additions.
inline Vec sums_of(const Register (&x)[kLanes]) {
#if defined(CPU_CAPABILITY_AVX512)
  __m512 pairs[8], quads[4], octets[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  }
  const auto halves = [](__m512 a, __m512 b) {
    const __m512d low = _mm512_castps_pd(a), high = _mm512_castps_pd(b);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  };
  const auto quarters = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) quads[i] = halves(pairs[2 * i], pairs[2 * i + 1]);
#pragma GCC unroll 8
  for (int i = 0; i < 2; ++i) octets[i] = quarters(quads[2 * i], quads[2 * i + 1]);
  return quarters(octets[0], octets[1]);
#elif defined(CPU_CAPABILITY_AVX2)
  __m256 quads[2];
#pragma GCC unroll 8
  for (int i = 0; i < 2; ++i) {
    quads[i] = _mm256_hadd_ps(_mm256_hadd_ps(x[4 * i], x[4 * i + 1]), _mm256_hadd_ps(x[4 * i + 2], x[4 * i + 3]));
  }
  return _mm256_add_ps(_mm256_permute2f128_ps(quads[0], quads[1], 0x20),
                       _mm256_permute2f128_ps(quads[0], quads[1], 0x31));
#else
  alignas(64) float sums[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) sums[i] = sum(x[i]);
  return Vec::loadu(sums);
#endif
}

/// How rows of the cache, of type T, meet rows of queries and of weights, of type E.
template <typename T, typename E>
struct CacheOperand {
  using Elements = Register;
  static constexpr int64_t kStep = kLanes;  // elements of a row that one instruction multiplies
  static constexpr int kKeyUnit = 1;        // keys whose products one instruction adds up
  static constexpr int kStepVectors = 1;    // vectors of sums that a step of columns has

  static Elements load(const T* p) { return load_floats(p); }
  static Elements load(const T* p, int64_t count) { return load_floats(p, count); }
  static Elements load_query(const float* p) { return Vec::loadu(p); }
  static Register multiply_add(const Elements& a, const Elements& b, const Register& c) {
    return at::vec::fmadd(Vec(a), Vec(b), Vec(c));
  }

  static Elements broadcast_weight(const float* p) { return Vec(*p); }
  static void add_to(float* out, const Register* sums) { (load_floats(out) + Vec(*sums)).store(out); }
};

#if defined(__AVX512BF16__)
template <>
struct CacheOperand<c10::BFloat16, c10::BFloat16> {
  using Elements = __m512bh;
  static constexpr int64_t kStep = 2 * kLanes;
  static constexpr int kKeyUnit = 2;
  static constexpr int kStepVectors = 2;

  static Elements load(const c10::BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Elements load(const c10::BFloat16* p, int64_t count) {
    return (__m512bh)_mm512_maskz_loadu_epi16((1u << count) - 1, p);
  }
  static Elements load_query(const c10::BFloat16* p) { return load(p); }
  static Register multiply_add(const Elements& a, const Elements& b, const Register& c) {
    return _mm512_dpbf16_ps(c, a, b);
  }

  static Elements broadcast_weight(const c10::BFloat16* p) { return Operand<c10::BFloat16>::broadcast(p); }
  /// Two keys' elements beside each other; the sums of each half of a 128-bit lane come in a vector of their own.
  static void interleave(const Elements& key, const Elements& next_key, Elements* values) {
    values[0] = (__m512bh)_mm512_unpacklo_epi16((__m512i)key, (__m512i)next_key);
    values[1] = (__m512bh)_mm512_unpackhi_epi16((__m512i)key, (__m512i)next_key);
  }
  static void add_to(float* out, const Register* sums) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    (Vec::loadu(out) + Vec(_mm512_permutex2var_ps(sums[0], first, sums[1]))).store(out);
    (Vec::loadu(out + kLanes) + Vec(_mm512_permutex2var_ps(sums[0], second, sums[1]))).store(out + kLanes);
  }
};
#endif

/// Scores of kRows query rows, `query_stride` apart and filled up with zeros to whole steps, and kLanes / kRows keys.
/// Lane row * keys + key of the result. kIsWhole: dim is a whole number of steps.
template <int kRows, bool kIsWhole, typename T, typename E>
Vec score_lanes(const E* query, int64_t query_stride, const T* const* keys, int64_t dim) {
  using Op = CacheOperand<T, E>;
  constexpr int kKeys = kLanes / kRows;
  Register r_sum[kLanes];
#pragma GCC unroll 16  // so that the array becomes registers
  for (int i = 0; i < kLanes; ++i) r_sum[i] = Vec(0.0f);
  for (int64_t d = 0; d < dim; d += Op::kStep) {
    typename Op::Elements r_query[kRows];
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) r_query[row] = Op::load_query(query + row * query_stride + d);
#pragma GCC unroll 16
    for (int key = 0; key < kKeys; ++key) {
      const T* const p = keys[key] + d;
      const typename Op::Elements r_key = kIsWhole || d + Op::kStep <= dim ? Op::load(p) : Op::load(p, dim - d);
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
        r_sum[row * kKeys + key] = Op::multiply_add(r_query[row], r_key, r_sum[row * kKeys + key]);
      }
    }
  }
  return sums_of(r_sum);
}

constexpr int64_t kCacheLine = 64;

template <typename T>
void prefetch_row(const T* row, int64_t dim) {
  for (int64_t i = 0; i < dim; i += kCacheLine / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + i);
}

/// Scores of kRows query rows and kLanes keys. Fetches as many rows of `fetched`, or null.
template <int kRows, typename T, typename E>
void score_rows(const E* query, int64_t query_stride, const T* const* keys, int64_t dim, float* score,
                int64_t score_stride, const T* const* fetched, int64_t fetched_dim) {
  constexpr int kKeys = kLanes / kRows;
  for (int key = 0; key < kLanes; key += kKeys) {
    if (fetched) {
      for (int i = key; i < key + kKeys; ++i) prefetch_row(fetched[i], fetched_dim);
    }
    alignas(64) float lanes[kLanes];
    const bool is_whole = dim % CacheOperand<T, E>::kStep == 0;
    const Vec r_score = is_whole ? score_lanes<kRows, true>(query, query_stride, keys + key, dim)
                                 : score_lanes<kRows, false>(query, query_stride, keys + key, dim);
    r_score.store(lanes);
    for (int row = 0; row < kRows; ++row) std::copy_n(lanes + row * kKeys, kKeys, score + row * score_stride + key);
  }
}

/// apply.template operator()<n>(first) for groups of n = 8, 4, 2 or 1 of `rows` rows, no more than a vector has lanes.
template <typename Apply>
void for_row_groups(int64_t rows, const Apply& apply) {
  constexpr int kMost = std::min<int>(8, kLanes);
  int64_t row = 0;
  for (; row + kMost <= rows; row += kMost) apply.template operator()<kMost>(row);
  if (row + 4 <= rows) apply.template operator()<4>(row), row += 4;
  if (row + 2 <= rows) apply.template operator()<2>(row), row += 2;
  if (row < rows) apply.template operator()<1>(row);
}

/// out (kRows x kSteps steps) += weights (kRows x keys) * values, from `column` on; the last step has `last` elements.
template <int kRows, int kSteps, bool kIsWhole, typename T, typename E>
void add_value_tile(const E* weights, int64_t weight_stride, const T* const* values, Span keys, int64_t column,
                    int64_t last, float* out, int64_t out_stride, const T* const* fetched) {
  using Op = CacheOperand<T, E>;
  constexpr int kVectors = kSteps * Op::kStepVectors;
  Register r_sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) r_sum[row][v] = Vec(0.0f);
  }
  const auto load = [&](int64_t key, int step) {
    const T* p = values[key] + column + step * Op::kStep;
    if constexpr (!kIsWhole) return Op::load(p, last);
    return Op::load(p);
  };
  const auto add_keys = [&](int64_t key, const auto& load_next) {
    typename Op::Elements r_value[kVectors];
#pragma GCC unroll 8
    for (int unit = 0; unit < Op::kKeyUnit; ++unit) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < kSteps * Op::kStep; i += kCacheLine / static_cast<int64_t>(sizeof(T))) {
        __builtin_prefetch(fetched[key + unit] + column + i);
      }
    }
#pragma GCC unroll 8
    for (int step = 0; step < kSteps; ++step) {
      if constexpr (Op::kKeyUnit == 2) {
        Op::interleave(load(key, step), load_next(key + 1, step), r_value + step * Op::kStepVectors);
      } else {
        r_value[step] = load(key, step);
      }
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const typename Op::Elements r_weight = Op::broadcast_weight(weights + row * weight_stride + key);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) r_sum[row][v] = Op::multiply_add(r_weight, r_value[v], r_sum[row][v]);
    }
  };
  int64_t key = keys.first;
  for (; key + Op::kKeyUnit <= keys.end; key += Op::kKeyUnit) add_keys(key, load);
  // The weight after the last key meets zeros.
  if (key < keys.end) add_keys(key, [](int64_t, int) { return typename Op::Elements{}; });
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int step = 0; step < kSteps; ++step) {
      Op::add_to(out + row * out_stride + column + step * Op::kStep, &r_sum[row][step * Op::kStepVectors]);
    }
  }
}

/// The same of all `dim` columns, kSteps steps at a time as long as there are so many.
template <int kRows, int kSteps, typename T, typename E>
void add_value_columns(const E* weights, int64_t weight_stride, const T* const* values, Span keys, int64_t column,
                       int64_t dim, float* out, int64_t out_stride, const T* const* fetched) {
  constexpr int64_t kStep = CacheOperand<T, E>::kStep;
  for (; column + kSteps * kStep <= dim; column += kSteps * kStep) {
    add_value_tile<kRows, kSteps, true>(weights, weight_stride, values, keys, column, kStep, out, out_stride, fetched);
  }
  if constexpr (kSteps > 1) {
    add_value_columns<kRows, kSteps / 2>(weights, weight_stride, values, keys, column, dim, out, out_stride, fetched);
  } else if (column < dim) {
    add_value_tile<kRows, 1, false>(weights, weight_stride, values, keys, column, dim - column, out, out_stride,
                                    fetched);
  }
}

/// out (kRows x dim) += weights * values of those keys. Fetches their columns of the rows of `fetched`.
template <int kRows, typename T, typename E>
void add_values(const E* weights, int64_t weight_stride, const T* const* values, Span keys, int64_t dim, float* out,
                int64_t out_stride, const T* const* fetched) {
  constexpr int kVectors = std::min<int>(8, kLanes / kRows);  // of sums, a row
  add_value_columns<kRows, kVectors / CacheOperand<T, E>::kStepVectors>(weights, weight_stride, values, keys, 0, dim,
                                                                        out, out_stride, fetched);
}

/// out (dim) += weight * one value.
template <typename T>
void add_value(float weight, const T* value, int64_t dim, float* out) {
  const Vec r_weight(weight);
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    at::vec::fmadd(r_weight, load_floats(value + i), load(out + i)).store(out + i);
  }
  for (; i < dim; ++i) out[i] += weight * static_cast<float>(value[i]);
}

}  // namespace CPU_CAPABILITY
}  // namespace selfattn::cpu
