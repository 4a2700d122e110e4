// Products that the backward kernels have in common, and the way of their sums into shared memory. Operands lie in
// panels as wgmma.cuh describes; descriptors count 16 bytes. Each issues one group of instructions and commits it.
#pragma once
#include "ptx/arithmetic.cuh"
#include "ptx/matrix.cuh"
#include "ptx/wgmma.cuh"

namespace selfattn::cuda::sm90 {

constexpr int kProductStep = 16;  // of the summed dimension in one instruction

// Fragments of the first kSteps steps of a left operand, for products that want it often: 4 registers a step.
template <int kSteps>
struct HeldRows {
  static constexpr int kCount = kSteps;
  uint32_t fragments[kSteps ? 4 * kSteps : 1];

  // s_row: of the warp's row lane % 16, in panels of kPanel bytes.
  template <int kPanel>
  __device__ __forceinline__ void load(uint32_t s_row, int lane) {
#pragma unroll
    for (int i = 0; i < kSteps; i++)
      ptx::load_matrix_x4(s_row + ptx::swizzled_columns(i, lane, kPanel), fragments + 4 * i);
  }
};

// d = left right^T over kDim columns, both operands from shared memory, their panels so many bytes apart; the left one,
// as far as it goes, from `held`.
template <class Element, int kDim, int kLeftPanel, int kRightPanel, int kCount, class Held = HeldRows<0>>
__device__ __forceinline__ void multiply_rows(float (&d)[kCount], uint64_t left, uint64_t right,
                                              const Held& held = {}) {
  using Product = ptx::Wgmma<Element, 2 * kCount>;
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < kDim / kProductStep; i++) {
    const uint64_t a = left + ptx::operand_columns(i, kLeftPanel), b = right + ptx::operand_columns(i, kRightPanel);
    if (i < Held::kCount && i == 0)
      Product::template rs_overwrite<>(d, held.fragments, b);
    else if (i < Held::kCount)
      Product::template rs<>(d, held.fragments + 4 * i, b);
    else if (i == 0)
      Product::template ss_overwrite<>(d, a, b);
    else
      Product::template ss<>(d, a, b);
  }
  ptx::wgmma_commit();
}

// d += left right over kRows rows of `right`; `left` from registers, packed as accumulators of its columns are.
template <class Element, int kRows, int kCount>
__device__ __forceinline__ void accumulate(float (&d)[kCount], const uint32_t* left, uint64_t right) {
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < kRows / kProductStep; i++) {
    ptx::Wgmma<Element, 2 * kCount>::template rs<true>(d, left + 4 * i,
                                                       right + i * ptx::operand_step(kProductStep * 128));
  }
  ptx::wgmma_commit();
}

// A sum times `factor`, rounded, as rows of panels in shared memory. s_row: of the warp's row lane % 16.
template <class Element, int kPanel, int kCount>
__device__ __forceinline__ void store_rows(uint32_t s_row, int lane, const float (&d)[kCount], float factor) {
#pragma unroll
  for (int i = 0; i < kCount / 8; i++) {
    const auto pair = [&](int j) { return ptx::pack<Element>(d[8 * i + j] * factor, d[8 * i + j + 1] * factor); };
    ptx::store_matrix_x4(s_row + ptx::swizzled_columns(i, lane, kPanel), pair(0), pair(2), pair(4), pair(6));
  }
}

}  // namespace selfattn::cuda::sm90
