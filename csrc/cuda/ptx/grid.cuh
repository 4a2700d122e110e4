// Hand-offs between thread blocks through counters in global memory.
#pragma once

namespace selfattn::ptx {

__device__ __forceinline__ int load_relaxed(const int* g_counter) {
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(g_counter) : "memory");
  return value;
}

// What the thread has done and seen so far comes before what it does next, for the whole device.
__device__ __forceinline__ void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Returns when the counter has reached `count`; what was released before is visible then.
__device__ __forceinline__ void wait_for_count(const int* g_counter, int count) {
  constexpr unsigned kPauseNanoseconds = 1000;
  while (load_relaxed(g_counter) < count)
    __nanosleep(kPauseNanoseconds);  // an acquire each time would empty the L1 cache
  fence_gpu();
}

// What this thread has done and seen so far is visible to whoever acquires the sum.
__device__ __forceinline__ void add_release(int* g_counter, int count) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(g_counter), "r"(count) : "memory");
}

// Both at once: what was there before, and what others have released with it is visible to this thread.
__device__ __forceinline__ int add_acquire_release(int* g_counter, int count) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(g_counter), "r"(count) : "memory");
  return before;
}

}  // namespace selfattn::ptx
