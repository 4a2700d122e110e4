// The family for every card since Ampere.
#include "flash/kernels.h"

#include "backward/dispatch.h"
#include "flash/segments/tables.h"
#include "forward/dispatch.h"
#include "host/device.h"

namespace selfattn::cuda {
namespace {

// Compiled for the architectures of the family: where it can run, the others can.
__global__ void flash_family_probe_kernel() {}

}  // namespace

const FlashKernels& sm80_kernels() {
  static constexpr FlashKernels kKernels = {
      .name = "sm80",
      .min_capability = 80,
      .max_capability = kNewest,
      .is_of_float32 = false,
      .is_of_unaligned = false,
      .reads_pages = true,
      .limits = {.max_head_dim = 256,
                 .max_length = 1 << 29,  // positions and windows are counted in 32 bits
                 .max_packed_length = kMaxSegmentLength},
      .is_built_for = is_built_for<flash_family_probe_kernel>,
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
