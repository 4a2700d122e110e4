#pragma once

// Operands in the layouts of the products (see FlashKernels).
#include <algorithm>
#include <bit>
#include <cstring>

#include "cpu/kernels/panel_gemm.h"

namespace selfattn::cpu {
inline namespace CPU_CAPABILITY {

/// Columns or rows of a tile.
struct Span {
  int64_t first = 0, end = 0;
  bool is_empty() const { return first >= end; }
  int64_t count() const { return end - first; }
};

/// Rows of E somewhere in memory.
template <typename E>
struct Rows {
  const E* data;
  int64_t stride;
};

/// `count` rows of `dim` elements as E, each followed by zeros up to `depth`: where they are, or else in scratch.
template <typename T, typename E>
Rows<E> as_operand(const T* src, int64_t stride, int64_t count, int64_t dim, int64_t depth, E* scratch) {
  if constexpr (std::is_same_v<T, E>) {
    if (dim == depth) return {src, stride};
  }
  for (int64_t row = 0; row < count; ++row) {
    E* dst = scratch + row * depth;
    if constexpr (std::is_same_v<T, E>) {
      std::copy_n(src + row * stride, dim, dst);
    } else {
      convert(src + row * stride, dst, dim);
    }
    std::fill(dst + dim, dst + depth, E(0.0f));
  }
  return {scratch, depth};
}

/// One row as E, in dst.
template <typename T, typename E>
void copy_row(const T* src, int64_t dim, int64_t depth, E* dst) {
  const auto rows = as_operand(src, 0, 1, dim, depth, dst);
  if (rows.data != dst) std::copy_n(rows.data, depth, dst);
}

// Operands whose rows are summed up with weights hold zeros in place of rows with an element that is NaN or infinite: a
// pair that is not allowed has weight 0, and 0 times NaN would reach it. What those rows give to pairs that are allowed
// is added one by one.

/// Bit i of the result: row i, of at most 64, has an element that is NaN or infinite.
template <typename T>
uint64_t find_nonfinite_rows(const T* src, int64_t stride, int64_t count, int64_t dim) {
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int16_t>;
  using BitsVec = at::vec::Vectorized<Bits>;
  constexpr Bits kMagnitude = std::numeric_limits<Bits>::max();
  const T infinity = std::numeric_limits<T>::infinity();
  Bits infinity_bits;
  std::memcpy(&infinity_bits, &infinity, sizeof(T));
  const auto largest_of = [&](int64_t first, int64_t end) {
    BitsVec r_largest(0);
    Bits largest = 0;
    for (int64_t row = first; row < end; ++row) {
      const T* p = src + row * stride;
      int64_t i = 0;
      for (; i + BitsVec::size() <= dim; i += BitsVec::size()) {
        r_largest = at::vec::maximum(r_largest, BitsVec::loadu(p + i) & BitsVec(kMagnitude));
      }
      for (; i < dim; ++i) {
        Bits bits;
        std::memcpy(&bits, p + i, sizeof(T));
        largest = std::max<Bits>(largest, bits & kMagnitude);
      }
    }
    alignas(64) Bits lanes[BitsVec::size()];
    r_largest.store(lanes);
    return std::max(largest, *std::max_element(lanes, lanes + BitsVec::size()));
  };
  if (largest_of(0, count) < infinity_bits) return 0;
  uint64_t found = 0;
  for (int64_t row = 0; row < count; ++row) {
    if (largest_of(row, row + 1) >= infinity_bits) found |= uint64_t{1} << row;
  }
  return found;
}

/// The rows with zeros in place of those whose bit is set, in scratch, where the rows may already be.
template <typename E>
Rows<E> without_rows(uint64_t bits, Rows<E> rows, int64_t count, int64_t dim, E* scratch) {
  const int64_t stride = rows.data == scratch ? rows.stride : dim;
  for (int64_t row = 0; row < count; ++row) {
    E* dst = scratch + row * stride;
    if (bits >> row & 1) {
      std::fill_n(dst, dim, E(0.0f));
    } else if (rows.data != scratch) {
      std::copy_n(rows.data + row * rows.stride, dim, dst);
    }
  }
  return {scratch, stride};
}

/// Calls apply(token) for the tokens whose bit is set in the words of kPanel tokens each.
template <typename Do>
void for_each_nonfinite(const uint64_t* words, Span tokens, const Do& apply) {
  static_assert(kPanel == 64 && kTileRows == 64);
  for (int64_t word = tokens.first / kPanel; word * kPanel < tokens.end; ++word) {
    for (uint64_t bits = words[word]; bits; bits &= bits - 1) {
      const int64_t token = word * kPanel + std::countr_zero(bits);
      if (tokens.first <= token && token < tokens.end) apply(token);
    }
  }
}

/// The transpose of a matrix of 4-byte words.
inline void transpose_words(const void* src, int64_t src_stride, int64_t rows, int64_t columns, void* dst,
                            int64_t dst_stride) {
  const float* from = static_cast<const float*>(src);
  float* to = static_cast<float*>(dst);
  const int64_t whole_rows = rows / kLanes * kLanes, whole_columns = columns / kLanes * kLanes;
  for (int64_t row = 0; row < whole_rows; row += kLanes) {
    for (int64_t column = 0; column < whole_columns; column += kLanes) {
      at::vec::transpose_mxn<float, kLanes, kLanes>(from + row * src_stride + column, src_stride,
                                                    to + column * dst_stride + row, dst_stride);
    }
  }
  const auto move = [&](int64_t row, int64_t column) {
    std::memcpy(static_cast<char*>(dst) + (column * dst_stride + row) * sizeof(float),
                static_cast<const char*>(src) + (row * src_stride + column) * sizeof(float), sizeof(float));
  };
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = row < whole_rows ? whole_columns : 0; column < columns; ++column) move(row, column);
  }
}

/// One block of the transposed layout: [depth][kPanel], units beside each other; tokens past `count` are zeros.
template <typename E>
void pack_transposed(Rows<E> rows, int64_t count, int64_t depth, E* dst) {
  constexpr int64_t kVnniWidth = Operand<E>::kVnniWidth;
  if (count < kPanel) std::fill_n(dst, depth * kPanel, E(0.0f));
  if constexpr (kVnniWidth == 1) {
    transpose_words(rows.data, rows.stride, count, depth, dst, kPanel);
  } else if (rows.stride % kVnniWidth == 0) {
    transpose_words(rows.data, rows.stride / kVnniWidth, count, depth / kVnniWidth, dst, kPanel);
  } else {
    for (int64_t row = 0; row < count; ++row) {
      transpose_words(rows.data + row * rows.stride, 0, 1, depth / kVnniWidth, dst + row * kVnniWidth, kPanel);
    }
  }
}

/// Rows `a` and `b` (null: zeros) of `dim` elements as one row of `width` units.
template <typename E>
void interleave(const E* a, const E* b, int64_t dim, int64_t width, E* dst) {
  int64_t i = 0;
#if defined(CPU_CAPABILITY_AVX512)
  for (; i + 16 <= dim; i += 16) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + i)));
    const __m512i high =
        b ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + i))) : _mm512_setzero_si512();
    _mm512_storeu_si512(dst + 2 * i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
#endif
  for (; i < dim; ++i) {
    dst[2 * i] = a[i];
    dst[2 * i + 1] = b ? b[i] : E(0.0f);
  }
  std::fill(dst + 2 * dim, dst + 2 * width, E(0.0f));
}

/// Tokens [first, first + kPanel) of the rows layout of `tokens` tokens; those past `count` are zeros.
template <typename E>
void pack_rows(Rows<E> rows, int64_t count, int64_t dim, int64_t first, int64_t tokens, E* dst) {
  constexpr int64_t kVnniWidth = Operand<E>::kVnniWidth;
  for (int64_t column = 0; column < dim; column += kPanel) {
    const int64_t used = std::min(kPanel, dim - column), width = round_up(used, kColumns);
    E* panel = dst + column * tokens + first * width;
    for (int64_t row = 0; row < kPanel; row += kVnniWidth, panel += width * kVnniWidth) {
      const E* src = rows.data + row * rows.stride + column;
      if (row >= count) {
        std::fill_n(panel, width * kVnniWidth, E(0.0f));
      } else if constexpr (kVnniWidth == 2) {
        interleave(src, row + 1 < count ? src + rows.stride : nullptr, used, width, panel);
      } else {
        std::copy_n(src, used, panel);
        std::fill(panel + used, panel + width, E(0.0f));
      }
    }
  }
}

/// dst[depth][kTileRows] = the transpose of src[kTileRows][depth].
inline void transpose_tile(const float* src, int64_t depth, float* dst) {
  transpose_words(src, depth, kTileRows, depth, dst, kTileRows);
}

#if defined(__AVX512BF16__)
inline void transpose_tile(const c10::BFloat16* src, int64_t depth, c10::BFloat16* dst) {
  alignas(64) c10::BFloat16 units[kLanes * kTileRows * 2];  // [unit][row]: a unit is two columns
  for (int64_t column = 0; column < depth; column += 2 * kLanes) {
    const int64_t count = std::min(kLanes, (depth - column) / 2);
    transpose_words(src + column, depth / 2, kTileRows, count, units, kTileRows);
    for (int64_t unit = 0; unit < count; ++unit) {
      c10::BFloat16* even = dst + (column + 2 * unit) * kTileRows;
      for (int64_t row = 0; row < kTileRows; row += 16) {
        const __m512i both = _mm512_load_si512(units + (unit * kTileRows + row) * 2);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(even + row), _mm512_cvtepi32_epi16(both));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(even + kTileRows + row),
                            _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
      }
    }
  }
}
#endif

}  // namespace CPU_CAPABILITY
}  // namespace selfattn::cpu
