#include "flash/sm90/forward/launch.cuh"

namespace selfattn::cuda {

cudaError_t launch_forward_128_fp16(const ForwardParams& params, cudaStream_t stream) {
  return launch_forward_by_mask<__half, 128, 128>(params, stream);
}

}  // namespace selfattn::cuda
