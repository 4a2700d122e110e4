#include "flash/sm80/backward/launch.cuh"

namespace selfattn::cuda::sm80 {

template struct BackwardLauncher<ElementType::kBFloat16, 96, 96>;

}  // namespace selfattn::cuda::sm80
