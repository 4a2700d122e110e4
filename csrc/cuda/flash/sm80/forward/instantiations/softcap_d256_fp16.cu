#include "flash/sm80/forward/launch.cuh"

namespace selfattn::cuda::sm80 {

template struct ForwardLauncher<ElementType::kHalf, 256, 256, true>;

}  // namespace selfattn::cuda::sm80
