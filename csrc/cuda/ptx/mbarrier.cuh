// Shared-memory barriers that count arrivals and bytes (PTX mbarrier). Barriers are given by reference and must
// lie in shared memory; other places there by their 32-bit address in the shared window (shared_address).
#pragma once
#include <cstdint>

#include "address.cuh"

namespace selfattn::ptx {

// A predicated store, never a branch.
__device__ __forceinline__ void store_shared_if(bool condition, uint32_t s_destination, int value) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %0, 0;\n"
      "@p st.shared.b32 [%1], %2;\n"
      "}\n" ::"r"(static_cast<int>(condition)),
      "r"(s_destination), "r"(value)
      : "memory");
}

__device__ __forceinline__ void mbarrier_init(uint64_t& barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

// Before the memory is used for another one.
__device__ __forceinline__ void mbarrier_invalidate(uint64_t& barrier) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Makes initialised barriers visible to TMA; once, before the __syncthreads that ends the setup.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Makes the phase, which is not over before a later arrival, wait for `bytes` of bulk copies.
__device__ __forceinline__ void mbarrier_expect(uint64_t& barrier, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}

// One arrival that also makes the phase wait for `bytes` of bulk copies.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t& barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}

// Returns once the phase of the given parity is complete. A fresh barrier lets a wait on parity 1 pass.
__device__ __forceinline__ void mbarrier_wait(const uint64_t& barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
#if __CUDA_ARCH__ >= 900
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
#else
      "mbarrier.test_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
#endif
      "@complete bra done;\n"
#if __CUDA_ARCH__ < 900
      "nanosleep.u32 40;\n"  // which try_wait does by itself
#endif
      "bra again;\n"
      "done:\n"
      "}\n" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

}  // namespace selfattn::ptx
