// One set of float32 backward kernels: declared here for the dispatch, defined in launch.cuh, instantiated in
// instantiations/.
#pragma once
#include "flash/float32/precision.h"
#include "flash/params.h"

namespace selfattn::cuda::float32 {

template <int kDim, Precision kPrecision, RowLayout kLayout = RowLayout::kAligned>
struct BackwardLauncher {
  static cudaError_t launch(const BackwardParams& params, cudaStream_t stream);
};

}  // namespace selfattn::cuda::float32
