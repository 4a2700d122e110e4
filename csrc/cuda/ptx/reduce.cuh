// Float32 additions into global memory that return nothing.
#pragma once
#include <cstdint>

namespace selfattn::ptx {

// Four neighbours at once, 16-byte aligned.
__device__ __forceinline__ void reduce_add_x4(float* g_destination, float a, float b, float c, float d) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(reinterpret_cast<uint64_t>(g_destination)), "f"(a),
               "f"(b), "f"(c), "f"(d)
               : "memory");
}

}  // namespace selfattn::ptx
