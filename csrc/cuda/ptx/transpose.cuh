// An 8x8 matrix of 16-bit elements, one register a lane as in matrix.cuh, transposed across the warp.
#pragma once
#include <cstdint>

namespace selfattn::ptx {

__device__ __forceinline__ uint32_t transpose_matrix(uint32_t r) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(r));
  return transposed;
}

}  // namespace selfattn::ptx
