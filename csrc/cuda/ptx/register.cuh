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

// The same value, of which the compiler knows nothing: what depends on it is computed where it is used, instead of
// being kept in registers from an earlier use on.
__device__ __forceinline__ int forget(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

template <class T>
__device__ __forceinline__ T* forget(T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

// Keeps a value in its register: it cannot be made anew where it is used, which ptxas else does with what it finds
// cheap. By whole warps.
__device__ __forceinline__ void keep(uint32_t& value) { value = __shfl_sync(~0u, value, threadIdx.x % 32); }

}  // namespace selfattn::ptx
