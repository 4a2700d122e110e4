// Thread blocks of one cluster: a barrier for all their threads, and reads of each other's shared memory.
#pragma once
#include <cstdint>

namespace selfattn::ptx {

// Memory written before by any thread of the cluster, shared or global, is visible to all after this.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The word at this thread block's shared address `address`, in the memory of block `rank` of the cluster.
__device__ __forceinline__ int load_from_block(uint32_t address, uint32_t rank) {
  int value;
  asm volatile(
      "{\n"
      ".reg .u32 remote;\n"
      "mapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.s32 %0, [remote];\n"
      "}\n"
      : "=r"(value)
      : "r"(address), "r"(rank)
      : "memory");
  return value;
}

}  // namespace selfattn::ptx
