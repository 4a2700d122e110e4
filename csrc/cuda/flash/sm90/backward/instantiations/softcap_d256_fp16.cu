#include "flash/sm90/backward/launch.cuh"

namespace selfattn::cuda::sm90 {

template struct BackwardLauncher<ElementType::kHalf, 256, true>;

}  // namespace selfattn::cuda::sm90
