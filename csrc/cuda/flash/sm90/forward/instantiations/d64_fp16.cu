#include "flash/sm90/forward/launch.cuh"

namespace selfattn::cuda {

cudaError_t launch_forward_64_fp16(const ForwardParams& params, cudaStream_t stream) {
  return launch_forward_by_mask<__half, 64, 64>(params, stream);
}

}  // namespace selfattn::cuda
