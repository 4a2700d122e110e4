// What the first pass of a kernel cannot multiply: elements that are not finite or too large to be split
// (precision.cuh). They spoil their products, those with a weight of 0 as well: 0 times NaN is NaN. That shows in the
// results, since nothing added to NaN or infinity makes it finite again. A tile whose results are not finite is
// computed once more by the same warps, with these steps of ordinary arithmetic between. All else keeps its bits.
#pragma once
#include "flash/tile/online_softmax.cuh"
#include "products.cuh"

namespace selfattn::cuda::float32 {

template <class Left, class Right>
__device__ __noinline__ float dot(const unsigned char* s_left, int left_row, const unsigned char* s_right,
                                  int right_row) {
  float sum = 0.f;
#pragma unroll 1
  for (int chunk = 0; chunk < Left::kChunks; chunk++) {
    const float4 a = *reinterpret_cast<const float4*>(s_left + Left::place(left_row, chunk));
    const float4 b = *reinterpret_cast<const float4*>(s_right + Right::place(right_row, chunk));
    sum = fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, sum))));
  }
  return sum;
}

// Scores that are not finite, once more. left_row: the warp's first row of `left`.
template <class Left, class Right, int kGroups, int kCount>
__device__ __forceinline__ void correct_products(float (&products)[kGroups][kCount], const unsigned char* s_left,
                                                 int left_row, const unsigned char* s_right, int right_row) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int g = 0; g < kGroups; g++)
#pragma unroll
    for (int i = 0; i < kCount; i++)
      if (!(fabsf(products[g][i]) < infinity()))
        products[g][i] = dot<Left, Right>(s_left, left_row + kProductRows * g + 8 * (i / 2 % 2) + lane / 4, s_right,
                                          right_row + i / 4 * 8 + 2 * (lane % 4) + i % 2);
}

// Adds the products of the exceptional elements of kColumns rows of `right`, from right_row on, to the sums of those
// rows that give them weight. By a warp; clear_exceptional must follow, behind a barrier.
template <class Right, int kGroups, int kCount, int kLeftCount>
__device__ __forceinline__ void add_exceptional(float (&sum)[kGroups][kCount], const float (&left)[kGroups][kLeftCount],
                                                unsigned char* s_right, int right_row) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
  for (int row = 0; row < 2 * kLeftCount; row++) {
    bool has_some = false;
#pragma unroll 1
    for (int column = lane; column < Right::kDim; column += kWarpSize)
      has_some = has_some || is_exceptional(Right::element(s_right, right_row + row, column));
    if (!__any_sync(~0u, has_some)) continue;
#pragma unroll
    for (int g = 0; g < kGroups; g++) {
      // The weights of the lane's two rows with this one, from the lane of the four that has them.
      float weight[2] = {};
#pragma unroll
      for (int i = 0; i < kLeftCount; i++)
        if (i / 4 == row / 8 && i % 2 == row % 2) weight[i / 2 % 2] = left[g][i];
#pragma unroll
      for (int r = 0; r < 2; r++) weight[r] = __shfl_sync(~0u, weight[r], lane / 4 * 4 + row % 8 / 2);
#pragma unroll
      for (int i = 0; i < kCount; i++) {
        const int column = i / 16 * kPanelColumns + lane % 4 * 8 + i % 2 * kChunkElements + i % 16 / 4;
        const float value = Right::element(s_right, right_row + row, column), own = weight[i / 2 % 2];
        if (is_exceptional(value) && own != 0.f) sum[g][i] = fmaf(own, value, sum[g][i]);
      }
    }
  }
}

// By all kThreads threads together; nobody waits.
template <class Tile, int kThreads>
__device__ __forceinline__ void clear_exceptional(unsigned char* s_tile) {
#pragma unroll 1
  for (int number = threadIdx.x; number < Tile::kRows * Tile::kDim; number += kThreads) {
    float& element = Tile::element(s_tile, number / Tile::kDim, number % Tile::kDim);
    if (is_exceptional(element)) element = 0.f;
  }
}

}  // namespace selfattn::cuda::float32
