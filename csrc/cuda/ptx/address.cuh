// Places in shared memory as instructions name them.
#pragma once
#include <cstdint>

namespace selfattn::ptx {

// The 32-bit address in the shared window.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace selfattn::ptx
