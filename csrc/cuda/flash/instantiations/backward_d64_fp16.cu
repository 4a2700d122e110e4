#include "../backward.cuh"

namespace selfattn::cuda {

template struct BackwardLauncher<ElementType::kHalf, 64>;

}  // namespace selfattn::cuda
