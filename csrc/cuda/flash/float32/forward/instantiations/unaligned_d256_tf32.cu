#include "flash/float32/forward/launch.cuh"

namespace selfattn::cuda::float32 {

template struct ForwardLauncher<256, Precision::kTf32, RowLayout::kUnaligned>;

}  // namespace selfattn::cuda::float32
