// Programmatic dependent launch: a kernel may start before the one ahead of it in the stream has ended.
#pragma once

namespace selfattn::ptx {

// In the kernel ahead: the next one may be brought up now.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// In the kernel behind: everything that the kernel ahead wrote is visible after this. Returns at once without one
// ahead.
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace selfattn::ptx
