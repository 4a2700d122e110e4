// Copies of 16 bytes from global to shared memory that a thread does not wait for: cp.async, of every card since
// Ampere.
#pragma once
#include <cstdint>

namespace selfattn::ptx {

// Zeros where is_there is false; the source is not read then.
__device__ __forceinline__ void copy_async(uint32_t s_target, const void* g_source, bool is_there) {
  const int bytes = is_there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(s_target), "l"(g_source), "r"(bytes) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the last kGroups groups of this thread's copies are there. Other threads see them behind a barrier.
template <int kGroups>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

}  // namespace selfattn::ptx
