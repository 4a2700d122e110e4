// The float32 backward kernels (FlashKernels says what is what).
#pragma once
#include "flash/params.h"

namespace selfattn::cuda::float32 {

TileSizes backward_tiles(const BackwardParams& params);
int backward_ordered_queries(const BackwardParams& params);
int64_t backward_workspace_bytes(const BackwardParams& params);
cudaError_t launch_backward(const BackwardParams& params, cudaStream_t stream);

}  // namespace selfattn::cuda::float32
