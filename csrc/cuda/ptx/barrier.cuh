// Named barriers of a thread block (0 is __syncthreads). `threads` counts those that sync and those that only arrive.
#pragma once

namespace selfattn::ptx {

__device__ __forceinline__ void barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// barrier_sync that also tells every thread whether the condition held for one of them.
__device__ __forceinline__ bool barrier_any(int barrier, int threads, bool condition) {
  int result;
  asm volatile(
      "{\n"
      ".reg .pred p, q;\n"
      "setp.ne.b32 p, %3, 0;\n"
      "bar.red.or.pred q, %1, %2, p;\n"
      "selp.b32 %0, 1, 0, q;\n"
      "}\n"
      : "=r"(result)
      : "r"(barrier), "r"(threads), "r"(static_cast<int>(condition))
      : "memory");
  return result;
}

}  // namespace selfattn::ptx
