#pragma once

// Matrix products on packed panels: register tiles of kRegisterRows rows by one to four vectors.
#include <cstring>

#include "cpu/flash_kernels.h"
#include "cpu/kernels/vector_math.h"

namespace selfattn::cpu {
inline namespace CPU_CAPABILITY {

/// How an operand of type E enters a product: a unit is one element, or two of 16 bits, whose products one instruction
/// adds up (VNNI).
template <typename E>
struct Operand;

template <>
struct Operand<float> {
  static constexpr int64_t kVnniWidth = 1;  // elements of a unit
  using Units = Vec;
  static Units load(const float* p) { return Vec::loadu(p); }
  static Units broadcast(const float* p) { return Vec(*p); }
  static Vec multiply_add(const Units& a, const Units& b, const Vec& c) { return at::vec::fmadd(a, b, c); }
};

#if defined(__AVX512BF16__)
template <>
struct Operand<c10::BFloat16> {
  static constexpr int64_t kVnniWidth = 2;
  using Units = __m512bh;
  static Units load(const c10::BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Units broadcast(const c10::BFloat16* p) {
    int32_t unit;
    std::memcpy(&unit, p, sizeof(unit));
    return (__m512bh)_mm512_set1_epi32(unit);
  }
  static Vec multiply_add(const Units& a, const Units& b, const Vec& c) { return _mm512_dpbf16_ps(c, a, b); }
};
#endif

constexpr int kRegisterRows = 6;
constexpr int64_t kRowGroup = 2 * kRegisterRows;  // rows of a tile that leave out the keys that none of them needs
constexpr int kRegisterVectors = kLanes == 16 ? 4 : kColumns / kLanes;

template <int kRows, int kVectors, typename E>
void register_tile(int64_t units, const E* a, int64_t lda, const E* b, int64_t ldb, float* c, int64_t ldc,
                   bool accumulate) {
  using Op = Operand<E>;
  Vec r_c[kRows][kVectors];
#pragma GCC unroll 8  // so that the array becomes registers
  for (int row = 0; row < kRows; ++row) {
    for (int v = 0; v < kVectors; ++v) r_c[row][v] = Vec(0.0f);
  }
  for (int64_t unit = 0; unit < units; ++unit) {
    typename Op::Units r_b[kVectors];
    for (int v = 0; v < kVectors; ++v) r_b[v] = Op::load(b + (unit * ldb + v * kLanes) * Op::kVnniWidth);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const auto r_a = Op::broadcast(a + row * lda + unit * Op::kVnniWidth);
      for (int v = 0; v < kVectors; ++v) r_c[row][v] = Op::multiply_add(r_a, r_b[v], r_c[row][v]);
    }
  }
  // Added at the end rather than summed up from: shorter chains of additions, smaller rounding errors.
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    for (int v = 0; v < kVectors; ++v) {
      float* dst = c + row * ldc + v * kLanes;
      (accumulate ? load(dst) + r_c[row][v] : r_c[row][v]).store(dst);
    }
  }
}

template <int kVectors, typename E>
void column_tile(int64_t m, int64_t units, const E* a, int64_t lda, const E* b, int64_t ldb, float* c, int64_t ldc,
                 bool accumulate) {
  for (; m >= kRegisterRows; m -= kRegisterRows, a += kRegisterRows * lda, c += kRegisterRows * ldc) {
    register_tile<kRegisterRows, kVectors>(units, a, lda, b, ldb, c, ldc, accumulate);
  }
  switch (m) {
    case 1:
      return register_tile<1, kVectors>(units, a, lda, b, ldb, c, ldc, accumulate);
    case 2:
      return register_tile<2, kVectors>(units, a, lda, b, ldb, c, ldc, accumulate);
    case 3:
      return register_tile<3, kVectors>(units, a, lda, b, ldb, c, ldc, accumulate);
    case 4:
      return register_tile<4, kVectors>(units, a, lda, b, ldb, c, ldc, accumulate);
    case 5:
      return register_tile<5, kVectors>(units, a, lda, b, ldb, c, ldc, accumulate);
  }
}

/// PanelGemm with operands of type E.
template <typename E>
void panel_gemm(int64_t m, int64_t n, int64_t k, const E* a, int64_t lda, const E* b, int64_t ldb, float* c,
                int64_t ldc, bool accumulate) {
  constexpr int64_t kWidth = kRegisterVectors * kLanes;
  const int64_t units = k / Operand<E>::kVnniWidth;
  int64_t column = 0;
  for (; column + kWidth <= n; column += kWidth) {
    column_tile<kRegisterVectors>(m, units, a, lda, b + column * Operand<E>::kVnniWidth, ldb, c + column, ldc,
                                  accumulate);
  }
  if (column == n) return;  // always, where kWidth is kColumns
  const E* b_rest = b + column * Operand<E>::kVnniWidth;
  switch ((n - column) / kColumns) {
    case 1:
      return column_tile<kColumns / kLanes>(m, units, a, lda, b_rest, ldb, c + column, ldc, accumulate);
    case 2:
      return column_tile<2 * kColumns / kLanes>(m, units, a, lda, b_rest, ldb, c + column, ldc, accumulate);
    case 3:
      return column_tile<3 * kColumns / kLanes>(m, units, a, lda, b_rest, ldb, c + column, ldc, accumulate);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace selfattn::cpu
