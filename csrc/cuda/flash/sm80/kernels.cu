// The family for every card since Ampere.
#include "flash/kernels.h"

#include "backward/dispatch.h"
#include "flash/segments/tables.h"
#include "forward/dispatch.h"

namespace selfattn::cuda {

const FlashKernels& sm80_kernels() {
  static constexpr FlashKernels kKernels = {
      .name = "sm80",
      .limits = {.max_head_dim = 256,
                 .head_dim_multiple = 8,  // of 2 bytes: copies are of 16
                 .max_length = 1 << 29,   // positions and windows are counted in 32 bits
                 .max_packed_length = kMaxSegmentLength},
      .forward_tiles = sm80::forward_tiles,
      .launch_forward = sm80::launch_forward,
      .backward_tiles = sm80::backward_tiles,
      .backward_ordered_queries = sm80::backward_ordered_queries,
      .backward_workspace_bytes = sm80::backward_workspace_bytes,
      .launch_backward = sm80::launch_backward,
  };
  return kKernels;
}

}  // namespace selfattn::cuda
