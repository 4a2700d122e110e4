// The family for Hopper.
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

const FlashKernels& sm90_kernels() {
  static constexpr FlashKernels kKernels = {
      .name = "sm90",
      .min_capability = 90,
      .max_capability = 90,
      .is_of_float32 = false,
      .is_of_unaligned = false,
      .reads_pages = true,
      .limits = {.max_head_dim = 256,
                 .max_length = 1 << 29,  // positions and windows are counted in 32 bits
                 .max_packed_length = kMaxSegmentLength},
      .is_built_for = is_built_for<flash_family_probe_kernel>,
      .forward_tiles = sm90::forward_tiles,
      .launch_forward = sm90::launch_forward,
      .backward_tiles = sm90::backward_tiles,
      .backward_ordered_queries = sm90::backward_ordered_queries,
      .backward_workspace_bytes = sm90::backward_workspace_bytes,
      .launch_backward = sm90::launch_backward,
  };
  return kKernels;
}

}  // namespace selfattn::cuda
