#pragma once

#include <cstdint>

// No torch header here: the CUDA kernels' side includes it, too.

namespace selfattn {

/// What the flash kernels of a CUDA device take.
struct KernelLimits {
  int max_head_dim;           ///< of q and k, and of v
  int head_dim_multiple;      ///< elements
  int64_t max_length;         ///< tokens of a row
  int64_t max_packed_length;  ///< of a row with segment ids
};

/// Those of a compute capability (10 * major + minor); null where this build has no flash kernels for it.
const KernelLimits* flash_kernel_limits(int capability);

}  // namespace selfattn
