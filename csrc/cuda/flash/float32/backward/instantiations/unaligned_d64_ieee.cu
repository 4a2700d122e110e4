#include "flash/float32/backward/launch.cuh"

namespace selfattn::cuda::float32 {

template struct BackwardLauncher<64, Precision::kIeee, RowLayout::kUnaligned>;

}  // namespace selfattn::cuda::float32
