// Rows of an operand in shared memory, looked at and cleared by a warp. Operands lie in panels of 128-byte rows,
// kPanelBytes apart; a row stays a row under the swizzle.
#pragma once
#include "ptx/arithmetic.cuh"

namespace selfattn::cuda::sm90 {

template <int kPanels, int kPanelBytes, class Do>
__device__ __forceinline__ void for_each_chunk(unsigned char* s_panels, int row, const Do& apply) {
  constexpr int kChunks = 8;  // of 16 bytes, in a row of a panel
#pragma unroll 1
  for (int chunk = threadIdx.x % 32; chunk < kChunks * kPanels; chunk += 32)
    apply(*reinterpret_cast<uint4*>(s_panels + chunk / kChunks * kPanelBytes + row * 128 + chunk % kChunks * 16));
}

template <class Element, int kPanels, int kPanelBytes>
__device__ __forceinline__ bool is_row_finite(unsigned char* s_panels, int row) {
  ptx::FiniteTest<Element> test;
  for_each_chunk<kPanels, kPanelBytes>(
      s_panels, row, [&](uint4& chunk) { test.add(chunk.x), test.add(chunk.y), test.add(chunk.z), test.add(chunk.w); });
  return __all_sync(~0u, test.all_finite());
}

template <int kPanels, int kPanelBytes>
__device__ __forceinline__ void clear_row(unsigned char* s_panels, int row) {
  for_each_chunk<kPanels, kPanelBytes>(s_panels, row, [](uint4& chunk) { chunk = uint4{}; });
}

// Only what is not finite in the row.
template <class Element, int kPanels, int kPanelBytes>
__device__ __forceinline__ void clear_non_finite(unsigned char* s_panels, int row) {
  for_each_chunk<kPanels, kPanelBytes>(s_panels, row, [](uint4& chunk) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint32_t& pair = (&chunk.x)[i];
      const float2 values = ptx::unpack<Element>(pair);
      if (!(fabsf(values.x) < INFINITY)) pair &= 0xffff0000u;
      if (!(fabsf(values.y) < INFINITY)) pair &= 0x0000ffffu;
    }
  });
}

}  // namespace selfattn::cuda::sm90
