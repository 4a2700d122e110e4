#include "common/kernel_limits.h"

namespace selfattn {

#ifndef SELFATTN_WITH_CUDA  // else csrc/cuda/flash/select_kernels.cu knows
const KernelLimits* flash_kernel_limits(int) { return nullptr; }
#endif

}  // namespace selfattn
