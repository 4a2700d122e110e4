// The float32 forward kernels (FlashKernels says what is what).
#pragma once
#include "flash/params.h"

namespace selfattn::cuda::float32 {

TileSizes forward_tiles(const ForwardParams& params);
cudaError_t launch_forward(const ForwardParams& params, cudaStream_t stream);

}  // namespace selfattn::cuda::float32
