#include "flash/sm80/backward/launch.cuh"

namespace selfattn::cuda::sm80 {

template struct BackwardLauncher<ElementType::kBFloat16, 64, 64, false, RowLayout::kUnaligned>;
template struct BackwardLauncher<ElementType::kBFloat16, 64, 64, true, RowLayout::kUnaligned>;

}  // namespace selfattn::cuda::sm80
