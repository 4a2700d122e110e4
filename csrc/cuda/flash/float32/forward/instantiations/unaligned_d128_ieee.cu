#include "flash/float32/forward/launch.cuh"

namespace selfattn::cuda::float32 {

template struct ForwardLauncher<128, Precision::kIeee, RowLayout::kUnaligned>;

}  // namespace selfattn::cuda::float32
