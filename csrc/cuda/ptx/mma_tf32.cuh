// Products of a warp with tf32 operands: mma.sync, of every card since Ampere.
//
// D (16, 8) = A (16, 8) B (8, 8) + C. With g = lane / 4 and t = lane % 4 a lane holds of A the elements (g, t), (g + 8,
// t), (g, t + 4), (g + 8, t + 4); of B (t, g), (t + 4, g); of C and D columns 2t, 2t + 1 of row g, then of row g + 8.
// Operands are floats whose low 13 bits are not read. ldmatrix (matrix.cuh) fills A, and B from columns as rows: a
// register is a 32-bit element then.
#pragma once
#include <cstdint>

namespace selfattn::ptx {

// d += a b.
__device__ __forceinline__ void multiply_tf32(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d = a b.
__device__ __forceinline__ void begin_multiply_tf32(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %10, %10, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
}

}  // namespace selfattn::ptx
