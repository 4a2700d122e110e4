// One forward kernel set: declared here for the dispatch, defined in launch.cuh, instantiated in instantiations/.
#pragma once
#include "flash/params.h"

namespace selfattn::cuda::sm80 {

template <ElementType kElement, int kDimQk, int kDimV, bool kHasSoftcap = false,
          RowLayout kLayout = RowLayout::kAligned>
struct ForwardLauncher {
  static cudaError_t launch(const ForwardParams& params, cudaStream_t stream);
};

}  // namespace selfattn::cuda::sm80
