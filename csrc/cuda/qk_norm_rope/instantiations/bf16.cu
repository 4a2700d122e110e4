#include "qk_norm_rope/launch.cuh"

namespace selfattn::cuda {

cudaError_t launch_qk_norm_rope_bf16(const NormRopeParams& params, bool is_backward, cudaStream_t stream) {
  return launch_qk_norm_rope<__nv_bfloat16>(params, is_backward, stream);
}

}  // namespace selfattn::cuda
