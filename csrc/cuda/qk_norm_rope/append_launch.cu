#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "append_params.h"

namespace selfattn::cuda {

// Of one element type: append_launch.cuh, compiled by the files in instantiations/.
template <class Element>
cudaError_t launch_append(const AppendParams& params, cudaStream_t stream);

cudaError_t launch_qk_norm_rope_append(AppendParams params, cudaStream_t stream) {
  if (const cudaError_t status = schedule_qk_norm_rope(params.norm_rope, /*is_backward=*/false)) return status;
  return params.norm_rope.element == FloatType::kBFloat16 ? launch_append<__nv_bfloat16>(params, stream)
                                                          : launch_append<__half>(params, stream);
}

}  // namespace selfattn::cuda
