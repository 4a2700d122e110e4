#include "flash/sm90/forward/launch.cuh"

namespace selfattn::cuda {

cudaError_t launch_forward_96_bf16(const ForwardParams& params, cudaStream_t stream) {
  return launch_forward_by_mask<__nv_bfloat16, 96, 96>(params, stream);
}

}  // namespace selfattn::cuda
