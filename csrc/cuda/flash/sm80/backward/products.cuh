// Products of a warp's 16 or 32 rows, and the way of a sum to global memory. The kernels for dQ and for dK and dV have
// them in common. Operands are tiles in shared memory (operand.cuh); a lane holds accumulators as mma.cuh says, kGroups
// groups of 16 rows.
#pragma once
#include "flash/sm80/operand.cuh"
#include "ptx/arithmetic.cuh"
#include "ptx/mma.cuh"

namespace selfattn::cuda::sm80 {

constexpr int kProductStep = 16;                           // of the summed dimension, in one instruction
constexpr int kStepBytes = kProductStep * kPanelRowBytes;  // so many rows of an operand

template <int kGroups, int kCount>
__device__ __forceinline__ void clear(float (&sum)[kGroups][kCount]) {
#pragma unroll
  for (int g = 0; g < kGroups; g++)
#pragma unroll
    for (int i = 0; i < kCount; i++) sum[g][i] = 0.f;
}

// products = left right^T over the columns of both, of the warp's rows of `left` (Left::left_place) with rows of
// `right` (Right::right_place, moved by a multiple of kStepBytes).
template <class Element, class Left, class Right, int kGroups, int kCount>
__device__ __forceinline__ void multiply_rows(float (&products)[kGroups][kCount], uint32_t left_place,
                                              uint32_t right_place) {
  static_assert(Left::kDim == Right::kDim);
#pragma unroll
  for (int step = 0; step < Left::kDim / kProductStep; step++) {
    uint32_t a[kGroups][4];
#pragma unroll
    for (int g = 0; g < kGroups; g++) Left::load_left(left_place + g * kStepBytes, step, a[g]);
#pragma unroll
    for (int pair = 0; pair < kCount / 8; pair++) {
      uint32_t b[4];
      Right::load_right(right_place, pair, step, b);
#pragma unroll
      for (int g = 0; g < kGroups; g++) {
        if (step == 0) {
          ptx::multiply_overwrite<Element>(products[g] + 8 * pair, a[g], b[0], b[1]);
          ptx::multiply_overwrite<Element>(products[g] + 8 * pair + 4, a[g], b[2], b[3]);
        } else {
          ptx::multiply<Element>(products[g] + 8 * pair, a[g], b[0], b[1]);
          ptx::multiply<Element>(products[g] + 8 * pair + 4, a[g], b[2], b[3]);
        }
      }
    }
  }
}

// sum += left right over rows of `right` (Right::left_place of its first, moved by a multiple of kStepBytes); `left` as
// pack_left gives it.
template <class Element, class Right, int kGroups, int kCount, int kPairs>
__device__ __forceinline__ void accumulate(float (&sum)[kGroups][kCount], const uint32_t (&left)[kGroups][kPairs],
                                           uint32_t right_place) {
  static_assert(kCount == Right::kDim / 2);
#pragma unroll
  for (int step = 0; step < kPairs / 4; step++) {
#pragma unroll
    for (int pair = 0; pair < Right::kDim / 16; pair++) {
      uint32_t b[4];
      Right::load_right_transposed(right_place, step, pair, b);
#pragma unroll
      for (int g = 0; g < kGroups; g++) {
        ptx::multiply<Element>(sum[g] + 8 * pair, left[g] + 4 * step, b[0], b[1]);
        ptx::multiply<Element>(sum[g] + 8 * pair + 4, left[g] + 4 * step, b[2], b[3]);
      }
    }
  }
}

// Accumulators as a left operand: both have the same layout.
template <class Element, int kGroups, int kCount>
__device__ __forceinline__ void pack_left(const float (&values)[kGroups][kCount],
                                          uint32_t (&packed)[kGroups][kCount / 2]) {
#pragma unroll
  for (int g = 0; g < kGroups; g++)
#pragma unroll
    for (int i = 0; i < kCount / 2; i++) packed[g][i] = ptx::pack<Element>(values[g][2 * i], values[g][2 * i + 1]);
}

// Whether row r of the lane's two rows of a group is finite in this lane's columns.
template <int kCount>
__device__ __forceinline__ bool is_row_finite(const float (&sum)[kCount], int r) {
  float zero = 0.f;
#pragma unroll
  for (int i = 0; i < kCount / 2; i++) zero = fmaf(sum[i / 2 * 4 + 2 * r + i % 2], 0.f, zero);
  return zero == zero;
}

template <class View>
__device__ __forceinline__ uint16_t* head_of(const View& view, int batch, int head) {
  return static_cast<uint16_t*>(view.data) + batch * view.stride_batch + head * view.stride_head;
}

// Copies the rows first_row .. of a tile in shared memory to a head that has `rows` of them. By kThreads threads.
template <class Tile, int kThreads>
__device__ __forceinline__ void store_tile(const unsigned char* s_tile, uint16_t* g_head, int64_t stride_token,
                                           int first_row, int rows, int dim) {
#pragma unroll 4
  for (int number = threadIdx.x; number < Tile::kRows * Tile::kChunks; number += kThreads) {
    const int row_in_tile = number / Tile::kChunks, chunk = number % Tile::kChunks, row = first_row + row_in_tile;
    if (row < rows && chunk * kChunkElements < dim)
      Tile::store_chunk(g_head + row * stride_token + chunk * kChunkElements, s_tile + Tile::place(row_in_tile, chunk),
                        dim - chunk * kChunkElements);
  }
}

// Rounds the warp's rows of a sum times `factor` into its own rows of s_tile, and copies those before `rows` to a head
// whose first row is g_head. first_row: number of the tile's first row; warp_row: of the warp's first row in the tile.
template <class Element, class Tile, int kGroups, int kCount>
__device__ __forceinline__ void store_rows(const float (&sum)[kGroups][kCount], float factor, unsigned char* s_tile,
                                           uint16_t* g_head, int64_t stride_token, int first_row, int warp_row,
                                           int rows, int dim) {
  static_assert(kCount == Tile::kDim / 2);
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int g = 0; g < kGroups; g++)
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int chunk = 0; chunk < Tile::kChunks; chunk++)
        *reinterpret_cast<uint32_t*>(s_tile + Tile::place(warp_row + 16 * g + 8 * r + lane / 4, chunk) +
                                     4 * (lane % 4)) =
            ptx::pack<Element>(sum[g][4 * chunk + 2 * r] * factor, sum[g][4 * chunk + 2 * r + 1] * factor);
  __syncwarp();
#pragma unroll 1
  for (int number = lane; number < 16 * kGroups * Tile::kChunks; number += kWarpSize) {
    const int row_in_tile = warp_row + number / Tile::kChunks, chunk = number % Tile::kChunks;
    const int row = first_row + row_in_tile;
    if (row < rows && chunk * kChunkElements < dim)
      Tile::store_chunk(g_head + row * stride_token + chunk * kChunkElements, s_tile + Tile::place(row_in_tile, chunk),
                        dim - chunk * kChunkElements);
  }
}

}  // namespace selfattn::cuda::sm80
