#include "qk_norm_rope/launch.cuh"

namespace selfattn::cuda {

cudaError_t launch_qk_norm_rope_fp16(const NormRopeParams& params, bool is_backward, cudaStream_t stream) {
  return launch_qk_norm_rope<__half>(params, is_backward, stream);
}

}  // namespace selfattn::cuda
