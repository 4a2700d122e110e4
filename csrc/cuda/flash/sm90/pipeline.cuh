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

// A consumer's place: its warpgroup (the producer's comes first), its warp in it, its lane. From an unsigned number
// ptxas computes them anew where they are used, from a signed one it keeps them in registers; each kernel has what was
// measured to be faster.
struct WarpPlace {
  int warpgroup, warp, lane;

  template <class Number>
  __device__ __forceinline__ explicit WarpPlace(Number thread)
      : warpgroup(__shfl_sync(~0u, thread / 128, 0) - 1), warp(thread / 32 % 4), lane(thread % 32) {}
};

// The barriers of a ring: one arrival, the producer's, fills a stage, and `readers` empty it.
template <int kStages>
__device__ __forceinline__ void init_ring(uint64_t (&full)[kStages], uint64_t (&empty)[kStages], int readers) {
  for (int i = 0; i < kStages; i++) ptx::mbarrier_init(full[i], 1), ptx::mbarrier_init(empty[i], readers);
}

__device__ __forceinline__ void invalidate_barriers(uint64_t* first, uint64_t* last) {
  for (uint64_t* barrier = first; barrier <= last; barrier++) ptx::mbarrier_invalidate(*barrier);
}

// By a warp, once: what all of its lanes have read may be written over.
__device__ __forceinline__ void arrive_by_warp(uint64_t& barrier, int lane) {
  __syncwarp();
  if (lane == 0) ptx::mbarrier_arrive(barrier);
}

}  // namespace selfattn::cuda::sm90
