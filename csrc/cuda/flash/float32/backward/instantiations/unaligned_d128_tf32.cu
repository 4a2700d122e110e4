#include "flash/float32/backward/launch.cuh"

namespace selfattn::cuda::float32 {

template struct BackwardLauncher<128, Precision::kTf32, RowLayout::kUnaligned>;

}  // namespace selfattn::cuda::float32
