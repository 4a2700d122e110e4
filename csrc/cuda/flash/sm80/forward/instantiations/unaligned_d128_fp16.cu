#include "flash/sm80/forward/launch.cuh"

namespace selfattn::cuda::sm80 {

template struct ForwardLauncher<ElementType::kHalf, 128, 128, false, RowLayout::kUnaligned>;
template struct ForwardLauncher<ElementType::kHalf, 128, 128, true, RowLayout::kUnaligned>;

}  // namespace selfattn::cuda::sm80
