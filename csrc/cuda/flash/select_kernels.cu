#include "kernels.h"

namespace selfattn::cuda {

const FlashKernels* select_kernels(int capability) {
  constexpr int kHopper = 90;
  return capability == kHopper ? &sm90_kernels() : nullptr;
}

}  // namespace selfattn::cuda
