// Products of a warp between tiles in shared memory (tile.cuh) and accumulators, kGroups groups of 16 rows.
//
// Scores: a lane holds, of rows g and g + 8 of a group (g = lane / 4, t = lane % 4), columns 8n + 2t and + 1 in
// [4n] .. [4n + 3], the two of row g first. Sums of rows (O, dQ, dK, dV): of panel p, [16p + 4j + 2r + h] is column
// 32p + 8t + 4h + j of row g + 8r; so a lane has eight columns side by side.
#pragma once
#include "tile.cuh"

namespace selfattn::cuda::float32 {

constexpr int kGroupBytes = kProductRows * kPanelRowBytes;  // so many rows of an operand

template <int kGroups, int kCount>
__device__ __forceinline__ void clear(float (&sum)[kGroups][kCount]) {
#pragma unroll
  for (int g = 0; g < kGroups; g++)
#pragma unroll
    for (int i = 0; i < kCount; i++) sum[g][i] = 0.f;
}

constexpr int kPairSteps = 2, kPairColumns = kPairSteps * kProductStep;  // of the columns that are multiplied together

// The warp's rows of a left operand, columns 16 * pair .. + 15.
template <Precision kPrecision, int kGroups>
struct LeftRows {
  Fragment<kPrecision, 4 * kPairSteps> of_group[kGroups];

  // left_place: Left::left_place of the first row, prepared.
  template <class Left>
  __device__ __forceinline__ void load(uint32_t left_place, int pair) {
#pragma unroll
    for (int g = 0; g < kGroups; g++) {
      uint32_t elements[4 * kPairSteps];
#pragma unroll
      for (int s = 0; s < kPairSteps; s++)
        Left::load_left(left_place + g * kGroupBytes, kPairSteps * pair + s, elements + 4 * s);
#pragma unroll
      for (int i = 0; i < 4 * kPairSteps; i++) of_group[g].set_prepared(i, __uint_as_float(elements[i]));
    }
  }
};

// products += left right^T over those columns of both, with rows of `right` (Right::right_place, moved by a multiple of
// 8 rows).
template <Precision kPrecision, class Right, bool kIsTransposed, int kGroups, int kCount>
__device__ __forceinline__ void multiply_pair(float (&products)[kGroups][kCount],
                                              const LeftRows<kPrecision, kGroups>& left, uint32_t right_place,
                                              int pair) {
#pragma unroll
  for (int n = 0; n < kCount / 4; n++) {
    uint32_t elements[2 * kPairSteps];
    Right::load_right(right_place, n, pair, elements);
    Fragment<kPrecision, 2 * kPairSteps> b;
#pragma unroll
    for (int i = 0; i < 2 * kPairSteps; i++) b.set(i, __uint_as_float(elements[i]));
#pragma unroll
    for (int g = 0; g < kGroups; g++)
      add_product<kPrecision, kPairSteps, kIsTransposed>(products[g] + 4 * n, left.of_group[g], b);
  }
}

// products = left right^T over all columns.
template <Precision kPrecision, class Left, class Right, bool kIsTransposed, int kGroups, int kCount>
__device__ __forceinline__ void multiply_rows(float (&products)[kGroups][kCount], uint32_t left_place,
                                              uint32_t right_place) {
  static_assert(Left::kDim == Right::kDim);
  clear(products);
  // Unrolled, kIeee takes more registers than there are.
  constexpr int kUnroll = kPrecision == Precision::kIeee ? 1 : Left::kDim / kPairColumns;
#pragma unroll kUnroll
  for (int pair = 0; pair < Left::kDim / kPairColumns; pair++) {
    LeftRows<kPrecision, kGroups> left;
    left.template load<Left>(left_place, pair);
    multiply_pair<kPrecision, Right, kIsTransposed>(products, left, right_place, pair);
  }
}

// sum += left right over the rows of `right` from s_right on (a multiple of 8 rows), as many as `left` has columns.
template <Precision kPrecision, class Right, int kGroups, int kCount, int kLeftCount>
__device__ __forceinline__ void accumulate(float (&sum)[kGroups][kCount], const float (&left)[kGroups][kLeftCount],
                                           const unsigned char* s_right) {
  static_assert(kCount == Right::kDim / 2);
  constexpr int kAllSteps = kLeftCount / 4, kSteps = kAllSteps < 2 ? kAllSteps : 2;
  const int rows_place = Right::rows_place();
#pragma unroll
  for (int step = 0; step < kAllSteps; step += kSteps) {
    Fragment<kPrecision, 4 * kSteps> a[kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; g++)
#pragma unroll
      for (int i = 0; i < 4 * kSteps; i++) {  // the two columns of a row become t and t + 4
        constexpr int kOrder[4] = {0, 2, 1, 3};
        a[g].set(i, left[g][4 * step + i / 4 * 4 + kOrder[i % 4]]);
      }
#pragma unroll
    for (int panel = 0; panel < Right::kPanels; panel++) {
      float4 rows[kSteps][2];
#pragma unroll
      for (int s = 0; s < kSteps; s++) Right::load_rows(s_right, rows_place, step + s, panel, rows[s]);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        Fragment<kPrecision, 2 * kSteps> b;
#pragma unroll
        for (int i = 0; i < 2 * kSteps; i++) {
          const float4& row = rows[i / 2][i % 2];
          b.set(i, j == 0 ? row.x : j == 1 ? row.y : j == 2 ? row.z : row.w);
        }
#pragma unroll
        for (int g = 0; g < kGroups; g++) add_product<kPrecision, kSteps, false>(sum[g] + 16 * panel + 4 * j, a[g], b);
      }
    }
  }
}

// Whether row r of the lane's two rows of a group is finite in this lane's columns.
template <int kCount>
__device__ __forceinline__ bool is_row_finite(const float (&sum)[kCount], int r) {
  float zero = 0.f;
#pragma unroll
  for (int i = 0; i < kCount / 2; i++) zero = fmaf(sum[i / 2 * 4 + 2 * r + i % 2], 0.f, zero);
  return zero == zero;
}

// A lane's eight columns of row r, of each panel, to a row in memory.
template <RowLayout kLayout, int kCount>
__device__ __forceinline__ void store_row(const float (&sum)[kCount], int r, float factor, float* g_row, int dim) {
  const int first_column = threadIdx.x % 4 * 8;
#pragma unroll
  for (int panel = 0; panel < kCount / 16; panel++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float* first = sum + 16 * panel + 2 * r + half;
      const int column = panel * kPanelColumns + first_column + half * kChunkElements;
      if constexpr (kLayout == RowLayout::kUnaligned)
        store_chunk(g_row + column, {first[0] * factor, first[4] * factor, first[8] * factor, first[12] * factor},
                    dim - column);
      else if (column < dim)
        *reinterpret_cast<float4*>(g_row + column) = {first[0] * factor, first[4] * factor, first[8] * factor,
                                                      first[12] * factor};
    }
}

// A warp's rows of a sum times `factor`, those before `rows`, to a head whose first row is g_head. first_row: number of
// the warp's first row.
template <RowLayout kLayout, int kGroups, int kCount>
__device__ __forceinline__ void store_rows(const float (&sum)[kGroups][kCount], float factor, float* g_head,
                                           int64_t stride_token, int first_row, int rows, int dim) {
#pragma unroll
  for (int g = 0; g < kGroups; g++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = first_row + kProductRows * g + 8 * r + threadIdx.x % kWarpSize / 4;
      if (row < rows) store_row<kLayout>(sum[g], r, factor, g_head + row * stride_token, dim);
    }
}

}  // namespace selfattn::cuda::float32
