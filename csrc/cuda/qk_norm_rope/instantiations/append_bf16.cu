#include "qk_norm_rope/append_launch.cuh"

namespace selfattn::cuda {

template cudaError_t launch_append<__nv_bfloat16>(const AppendParams& params, cudaStream_t stream);

}  // namespace selfattn::cuda
