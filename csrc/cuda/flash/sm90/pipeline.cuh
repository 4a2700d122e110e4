// A position in a ring of stages and the parity of the round, for one side of a pair of barriers.
#pragma once
#include <cstdint>

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

}  // namespace selfattn::cuda::sm90
