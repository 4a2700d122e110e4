#include "flash/sm80/backward/launch.cuh"

namespace selfattn::cuda::sm80 {

template struct BackwardLauncher<ElementType::kHalf, 192, 128>;

}  // namespace selfattn::cuda::sm80
