// Products that the backward kernels have in common. Operands lie in panels as wgmma.cuh describes; descriptors count
// 16 bytes. Each issues one group of instructions and commits it.
#pragma once
#include "../ptx/wgmma.cuh"

namespace selfattn::cuda {

constexpr int kProductStep = 16;  // of the summed dimension in one instruction

// d = left right^T over kDim columns, both operands from shared memory, their panels so many bytes apart.
template <class Element, int kDim, int kLeftPanel, int kRightPanel, int kCount>
__device__ __forceinline__ void multiply_rows(float (&d)[kCount], uint64_t left, uint64_t right) {
  using Product = ptx::Wgmma<Element, 2 * kCount>;
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < kDim / kProductStep; i++) {
    const uint64_t a = left + (i / 4 * kLeftPanel + i % 4 * 32) / 16,
                   b = right + (i / 4 * kRightPanel + i % 4 * 32) / 16;
    if (i == 0)
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
    ptx::Wgmma<Element, 2 * kCount>::template rs<true>(d, left + 4 * i, right + i * (kProductStep * 128 / 16));
  }
  ptx::wgmma_commit();
}

}  // namespace selfattn::cuda
