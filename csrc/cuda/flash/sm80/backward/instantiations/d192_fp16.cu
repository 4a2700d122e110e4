#include "flash/sm80/backward/launch.cuh"

namespace selfattn::cuda::sm80 {

template struct BackwardLauncher<ElementType::kHalf, 192, 192>;

}  // namespace selfattn::cuda::sm80
