#include "flash/sm90/forward/launch.cuh"

namespace selfattn::cuda {

cudaError_t launch_forward_192_128_bf16(const ForwardParams& params, cudaStream_t stream) {
  return launch_forward_by_mask<__nv_bfloat16, 192, 128>(params, stream);
}

}  // namespace selfattn::cuda
