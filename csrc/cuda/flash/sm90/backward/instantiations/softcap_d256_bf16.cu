#include "flash/sm90/backward/launch.cuh"

namespace selfattn::cuda::sm90 {

template struct BackwardLauncher<ElementType::kBFloat16, 256, true>;

}  // namespace selfattn::cuda::sm90
