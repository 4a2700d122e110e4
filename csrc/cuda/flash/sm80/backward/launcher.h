// One set of backward kernels: declared here for the dispatch, defined in launch.cuh, instantiated in instantiations/.
#pragma once
#include "flash/params.h"

namespace selfattn::cuda::sm80 {

template <ElementType kElement, int kDimQk, int kDimV, bool kHasSoftcap = false,
          RowLayout kLayout = RowLayout::kAligned>
struct BackwardLauncher {
  static cudaError_t launch(const BackwardParams& params, cudaStream_t stream);
  static int64_t workspace_bytes(const BackwardParams& params);
};

}  // namespace selfattn::cuda::sm80
