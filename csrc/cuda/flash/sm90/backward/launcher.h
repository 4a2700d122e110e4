// One backward kernel set: declared here for the dispatch, defined in launch.cuh, instantiated in instantiations/.
#pragma once
#include "flash/params.h"

namespace selfattn::cuda::sm90 {

template <ElementType kElement, int kHeadDim, bool kHasSoftcap = false>
struct BackwardLauncher {
  static int64_t workspace_bytes(const BackwardParams& params);
  static cudaError_t launch(const BackwardParams& params, cudaStream_t stream);
};

}  // namespace selfattn::cuda::sm90
