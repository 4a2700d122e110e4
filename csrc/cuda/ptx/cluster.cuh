// Clusters: thread blocks that run at once on neighbouring SMs and see each other's shared memory. Of Hopper and later
// cards; for others nothing here is compiled to anything.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace selfattn::ptx {

// This thread block's place among those of its cluster.
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}

__device__ __forceinline__ int cluster_blocks() {
  uint32_t blocks = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
#endif
  return static_cast<int>(blocks);
}

// A barrier of all threads of the cluster, in two halves, by whole warps: what was written before the first is visible
// behind the second.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Where another thread block of the cluster has what lies at s_address in this one.
__device__ __forceinline__ uint32_t address_in_block(uint32_t s_address, int rank) {
  uint32_t address = s_address;
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(s_address), "r"(rank));
#endif
  return address;
}

__device__ __forceinline__ float2 load_pair_of_cluster(uint32_t address) {
  float2 pair{};
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(address) : "memory");
#endif
  return pair;
}
__device__ __forceinline__ float4 load_four_of_cluster(uint32_t address) {
  float4 four{};
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(four.x), "=f"(four.y), "=f"(four.z), "=f"(four.w)
               : "r"(address)
               : "memory");
#endif
  return four;
}

}  // namespace selfattn::ptx
