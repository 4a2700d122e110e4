// The forward kernels of the family (FlashKernels says what is what).
#pragma once
#include "flash/params.h"

namespace selfattn::cuda::sm80 {

TileSizes forward_tiles(const ForwardParams& params);
cudaError_t launch_forward(const ForwardParams& params, cudaStream_t stream);

}  // namespace selfattn::cuda::sm80
