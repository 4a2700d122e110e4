#include "flash/float32/backward/launch.cuh"

namespace selfattn::cuda::float32 {

template struct BackwardLauncher<256, Precision::kTf32, RowLayout::kUnaligned>;

}  // namespace selfattn::cuda::float32
