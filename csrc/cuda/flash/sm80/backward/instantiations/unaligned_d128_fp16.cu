#include "flash/sm80/backward/launch.cuh"

namespace selfattn::cuda::sm80 {

template struct BackwardLauncher<ElementType::kHalf, 128, 128, false, RowLayout::kUnaligned>;
template struct BackwardLauncher<ElementType::kHalf, 128, 128, true, RowLayout::kUnaligned>;

}  // namespace selfattn::cuda::sm80
