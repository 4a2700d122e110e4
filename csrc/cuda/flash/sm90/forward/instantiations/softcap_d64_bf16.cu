#include "flash/sm90/forward/launch.cuh"

namespace selfattn::cuda::sm90 {

template struct ForwardLauncher<ElementType::kBFloat16, 64, 64, true>;

}  // namespace selfattn::cuda::sm90
