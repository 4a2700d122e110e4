// Copies of 16 bytes and less from global to shared memory that a thread does not wait for: cp.async, of every card
// since Ampere.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "address.cuh"

namespace selfattn::ptx {

// Zeros where is_there is false; the source is not read then.
__device__ __forceinline__ void copy_async(uint32_t s_target, const void* g_source, bool is_there) {
  const int bytes = is_there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(s_target), "l"(g_source), "r"(bytes) : "memory");
}

// 8 or 4 bytes, aligned to as many.
template <int kBytes>
__device__ __forceinline__ void copy_piece_async(uint32_t s_target, const void* g_source, bool is_there) {
  static_assert(kBytes == 8 || kBytes == 4);
  const int bytes = is_there ? kBytes : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(s_target), "l"(g_source), "n"(kBytes), "r"(bytes)
               : "memory");
}

// 16 bytes from registers, which other threads see behind a barrier as they see the copies.
__device__ __forceinline__ void store_shared(uint32_t s_target, const uint4& chunk) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(s_target), "r"(chunk.x), "r"(chunk.y), "r"(chunk.z),
               "r"(chunk.w)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the last kGroups groups of this thread's copies are there. Other threads see them behind a barrier.
template <int kGroups>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// One arrival at an mbarrier, of those that it counts, once all copies that this thread has started are there.
__device__ __forceinline__ void arrive_after_copies(uint64_t& barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

}  // namespace selfattn::ptx
