#include "flash/sm80/forward/launch.cuh"

namespace selfattn::cuda::sm80 {

template struct ForwardLauncher<ElementType::kBFloat16, 256, 256, true>;

}  // namespace selfattn::cuda::sm80
