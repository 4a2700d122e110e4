// One float32 forward kernel: declared here for the dispatch, defined in launch.cuh, instantiated in instantiations/.
#pragma once
#include "flash/float32/precision.h"
#include "flash/params.h"

namespace selfattn::cuda::float32 {

template <int kDim, Precision kPrecision, RowLayout kLayout = RowLayout::kAligned>
struct ForwardLauncher {
  static cudaError_t launch(const ForwardParams& params, cudaStream_t stream);
};

}  // namespace selfattn::cuda::float32
