// Division by a number that is the same for a whole launch, as a product and a shift.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace selfattn::cuda {

// Of numbers below 2^31. With 2^(shift - 1) < divisor <= 2^shift, the multiplier 2^(31 + shift) / divisor rounded up
// has 32 bits, and its error is too small to reach the next quotient (Granlund and Montgomery 1994).
struct Divisor {
  int value;
  uint32_t multiplier;
  int shift;

  static Divisor of(int value) {
    int shift = 0;
    while ((int64_t(1) << shift) < value) shift++;
    const uint64_t power = uint64_t(1) << (31 + shift);
    return {value, static_cast<uint32_t>((power + value - 1) / value), shift};
  }
};

__device__ __forceinline__ int operator/(int number, const Divisor& divisor) {
  return static_cast<int>(uint64_t(static_cast<uint32_t>(number)) * divisor.multiplier >> (31 + divisor.shift));
}

}  // namespace selfattn::cuda
