#include "qk_norm_rope/launch.cuh"

namespace selfattn::cuda {

template cudaError_t launch_kernels<__half>(const NormRopeParams& params, bool is_backward, cudaStream_t stream);

}  // namespace selfattn::cuda
