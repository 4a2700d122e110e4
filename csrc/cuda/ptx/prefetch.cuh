// Asking for memory ahead of its use.
#pragma once
#include <cstdint>

namespace selfattn::ptx {

// The line that holds *g_data, into L2.
__device__ __forceinline__ void prefetch_to_l2(const void* g_data) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(g_data)) : "memory");
}

}  // namespace selfattn::ptx
