#include "qk_norm_rope/append_launch.cuh"

namespace selfattn::cuda {

template cudaError_t launch_append<__half>(const AppendParams& params, cudaStream_t stream);

}  // namespace selfattn::cuda
