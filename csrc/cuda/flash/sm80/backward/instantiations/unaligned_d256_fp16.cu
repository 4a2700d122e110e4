#include "flash/sm80/backward/launch.cuh"

namespace selfattn::cuda::sm80 {

template struct BackwardLauncher<ElementType::kHalf, 256, 256, false, RowLayout::kUnaligned>;
template struct BackwardLauncher<ElementType::kHalf, 256, 256, true, RowLayout::kUnaligned>;

}  // namespace selfattn::cuda::sm80
