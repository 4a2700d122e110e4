// Programmatic dependent launch: a kernel may start before the one ahead of it in the stream has ended. Cards before
// Hopper have no such thing: there a kernel starts when the one ahead has ended, and nothing need be said.
#pragma once

namespace selfattn::ptx {

// In the kernel ahead: the next one may be brought up now.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// In the kernel behind: everything that the kernel ahead wrote is visible after this. Returns at once without one
// ahead.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace selfattn::ptx
