// 8x8 matrices of 16-bit elements between shared memory and the fragments of a warp. Lane l gives the address of row l
// % 8 of matrix l / 8; register i of a lane holds elements 2 * (l % 4) and + 1 of row l / 4 of matrix i.
#pragma once
#include <cstdint>

namespace selfattn::ptx {

__device__ __forceinline__ void load_matrix_x4(uint32_t s_row, uint32_t* r) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(s_row)
               : "memory");
}

// Each matrix transposed: a lane's elements are 2 * (l % 4) and + 1 of column l / 4.
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t s_row, uint32_t* r) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(s_row)
               : "memory");
}

// One lane's share of a matrix.
__device__ __forceinline__ void store_pair(uint32_t s_target, uint32_t pair) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(s_target), "r"(pair) : "memory");
}

__device__ __forceinline__ void store_matrix_x4(uint32_t s_row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(s_row), "r"(r0), "r"(r1),
               "r"(r2), "r"(r3)
               : "memory");
}

__device__ __forceinline__ void store_matrix_x4_transposed(uint32_t s_row, uint32_t r0, uint32_t r1, uint32_t r2,
                                                           uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(s_row), "r"(r0), "r"(r1),
               "r"(r2), "r"(r3)
               : "memory");
}

// Where row lane % 16 of an operand has, for this lane, the i-th 16 columns: bytes from the start of the row, in panels
// of 128-byte rows with 128-byte swizzle that are panel_bytes apart (wgmma.cuh).
__device__ __forceinline__ int swizzled_columns(int i, int lane, int panel_bytes) {
  return i / 4 * panel_bytes + ((i % 4 * 2 + lane / 16) ^ (lane % 8)) * 16;
}

}  // namespace selfattn::ptx
