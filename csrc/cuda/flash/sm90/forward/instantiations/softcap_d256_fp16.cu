#include "flash/sm90/forward/launch.cuh"

namespace selfattn::cuda::sm90 {

template struct ForwardLauncher<ElementType::kHalf, 256, 256, true>;

}  // namespace selfattn::cuda::sm90
