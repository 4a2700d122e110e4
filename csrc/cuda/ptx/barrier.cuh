// Named barriers of a thread block (0 is __syncthreads). `threads` counts those that sync and those that only arrive.
#pragma once

namespace selfattn::ptx {

__device__ __forceinline__ void barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace selfattn::ptx
