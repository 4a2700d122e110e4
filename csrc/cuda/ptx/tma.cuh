// Bulk copies between global and shared memory by TMA, with and without a tensor map.
// Loads complete on an mbarrier; stores are grouped and waited for by the issuing thread.
#pragma once
#include <cuda.h>

#include <cstdint>

#include "mbarrier.cuh"

namespace selfattn::ptx {

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

// One box of a 4-D tensor into shared memory; what lies outside the tensor arrives as zeros (and counts as bytes).
__device__ __forceinline__ void tma_load_4d(const CUtensorMap* map, uint64_t& barrier, uint32_t s_destination, int c0,
                                            int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(s_destination),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// One box out of shared memory; what lies outside the tensor is not written.
__device__ __forceinline__ void tma_store_4d(const CUtensorMap* map, uint32_t s_source, int c0, int c1, int c2,
                                             int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
                   reinterpret_cast<uint64_t>(map)),
               "r"(s_source), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

// Contiguous bytes into shared memory. Both addresses and the size are multiples of 16.
__device__ __forceinline__ void bulk_load(uint64_t& barrier, uint32_t s_destination, const void* g_source,
                                          uint32_t bytes) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(s_destination),
      "l"(reinterpret_cast<uint64_t>(g_source)), "r"(bytes), "r"(shared_address(&barrier))
      : "memory");
}

// Contiguous float32 out of shared memory, added to what stands in global memory. Multiples of 16 bytes, as above.
__device__ __forceinline__ void bulk_reduce_add(float* g_destination, uint32_t s_source, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                   reinterpret_cast<uint64_t>(g_destination)),
               "r"(s_source), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// At most kPending groups of this thread still read their shared memory.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// At most kPending groups of this thread are not yet complete, writes included.
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace selfattn::ptx
