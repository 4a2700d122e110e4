#include "flash/sm80/forward/launch.cuh"

namespace selfattn::cuda::sm80 {

template struct ForwardLauncher<ElementType::kBFloat16, 64, 64, false, RowLayout::kUnaligned>;
template struct ForwardLauncher<ElementType::kBFloat16, 64, 64, true, RowLayout::kUnaligned>;

}  // namespace selfattn::cuda::sm80
