#include "flash/sm80/backward/launch.cuh"

namespace selfattn::cuda::sm80 {

template struct BackwardLauncher<ElementType::kBFloat16, 128, 128, false, RowLayout::kUnaligned>;
template struct BackwardLauncher<ElementType::kBFloat16, 128, 128, true, RowLayout::kUnaligned>;

}  // namespace selfattn::cuda::sm80
