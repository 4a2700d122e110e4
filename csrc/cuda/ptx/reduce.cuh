// Float32 additions into global memory that return nothing.
#pragma once
#include <cstdint>

namespace selfattn::ptx {

// Four neighbours at once, 16-byte aligned. From compute capability 9.0 on.
__device__ __forceinline__ void reduce_add_x4(float* g_destination, float a, float b, float c, float d) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(reinterpret_cast<uint64_t>(g_destination)), "f"(a),
               "f"(b), "f"(c), "f"(d)
               : "memory");
}

// How many neighbours every card adds at once.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr int kReduceWidth = 4;
#else
constexpr int kReduceWidth = 1;
#endif

// So many of them, aligned to their size.
__device__ __forceinline__ void reduce_add(float* g_destination, const float* values) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  reduce_add_x4(g_destination, values[0], values[1], values[2], values[3]);
#else
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(reinterpret_cast<uint64_t>(g_destination)), "f"(values[0])
               : "memory");
#endif
}

}  // namespace selfattn::ptx
