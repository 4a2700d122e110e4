#include "flash/sm80/forward/launch.cuh"

namespace selfattn::cuda::sm80 {

template struct ForwardLauncher<ElementType::kHalf, 96, 96>;

}  // namespace selfattn::cuda::sm80
