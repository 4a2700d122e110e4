#include "common/device.h"

#ifdef SELFATTN_WITH_CUDA
#include <ATen/cuda/CUDAContext.h>
#endif

namespace selfattn {

std::optional<int> compute_capability([[maybe_unused]] const c10::Device& device) {
#ifdef SELFATTN_WITH_CUDA
  if (device.index() >= at::cuda::device_count() || at::cuda::device_count() == 0) return std::nullopt;
  const cudaDeviceProp* properties = at::cuda::getDeviceProperties(device.index());
  return 10 * properties->major + properties->minor;
#else
  return std::nullopt;
#endif
}

}  // namespace selfattn
