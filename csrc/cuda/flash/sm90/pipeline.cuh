// Rings of stages in shared memory, each with a pair of barriers: a position and the parity of the round, for one side.
#pragma once
#include <cstdint>

#include "ptx/mbarrier.cuh"

namespace selfattn::cuda::sm90 {

template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ Ring next() const {
    Ring ring = *this;
    ring.advance();
    return ring;
  }
  __device__ __forceinline__ Ring previous() const {
    return stage ? Ring{stage - 1, parity} : Ring{kStages - 1, parity ^ 1};
  }
};

// By a warp, once: what all of its lanes have read may be written over.
__device__ __forceinline__ void arrive_by_warp(uint64_t& barrier, int lane) {
  __syncwarp();
  if (lane == 0) ptx::mbarrier_arrive(barrier);
}

}  // namespace selfattn::cuda::sm90
