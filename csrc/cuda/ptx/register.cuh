// Registers a thread, changed at run time for a whole warpgroup. The totals of all warpgroups must fit what the launch
// gave.
#pragma once

namespace selfattn::ptx {

template <int kRegisters>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace selfattn::ptx
