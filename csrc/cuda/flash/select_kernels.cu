#include "kernels.h"

namespace selfattn {
namespace cuda {

const FlashKernels* select_kernels(int capability) {
  constexpr int kHopper = 90;
  return capability == kHopper ? &sm90_kernels() : nullptr;
}

}  // namespace cuda

const KernelLimits* flash_kernel_limits(int capability) {
  const cuda::FlashKernels* kernels = cuda::select_kernels(capability);
  return kernels ? &kernels->limits : nullptr;
}

}  // namespace selfattn
