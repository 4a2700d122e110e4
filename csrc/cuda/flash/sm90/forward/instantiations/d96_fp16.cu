#include "flash/sm90/forward/launch.cuh"

namespace selfattn::cuda::sm90 {

template struct ForwardLauncher<ElementType::kHalf, 96, 96>;

}  // namespace selfattn::cuda::sm90
