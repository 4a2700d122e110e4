#include "flash/sm90/forward/launch.cuh"

namespace selfattn::cuda {

cudaError_t launch_forward_192_fp16(const ForwardParams& params, cudaStream_t stream) {
  return launch_forward_by_mask<__half, 192, 192>(params, stream);
}

}  // namespace selfattn::cuda
