#include "flash/sm80/forward/launch.cuh"

namespace selfattn::cuda::sm80 {

template struct ForwardLauncher<ElementType::kBFloat16, 256, 256, false, RowLayout::kUnaligned>;
template struct ForwardLauncher<ElementType::kBFloat16, 256, 256, true, RowLayout::kUnaligned>;

}  // namespace selfattn::cuda::sm80
