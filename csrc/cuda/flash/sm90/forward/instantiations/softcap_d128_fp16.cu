#include "flash/sm90/forward/launch.cuh"

namespace selfattn::cuda::sm90 {

template struct ForwardLauncher<ElementType::kHalf, 128, 128, true>;

}  // namespace selfattn::cuda::sm90
