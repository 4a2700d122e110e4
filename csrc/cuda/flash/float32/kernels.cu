// The kernels for float32, of every card since Ampere.
#include "flash/kernels.h"

#include "backward/dispatch.h"
#include "flash/segments/tables.h"
#include "forward/dispatch.h"
#include "host/device.h"

namespace selfattn::cuda {
namespace {

// Compiled for the architectures of the family: where it can run, the others can.
__global__ void float32_family_probe_kernel() {}

}  // namespace

const FlashKernels& float32_kernels() {
  static constexpr FlashKernels kKernels = {
      .name = "float32",
      .min_capability = 80,
      .max_capability = kNewest,
      .is_of_float32 = true,
      .is_of_unaligned = false,
      .reads_pages = false,
      .limits = {.max_head_dim = 256,
                 .max_length = 1 << 29,  // positions and windows are counted in 32 bits
                 .max_packed_length = kMaxSegmentLength},
      .is_built_for = is_built_for<float32_family_probe_kernel>,
      .forward_tiles = float32::forward_tiles,
      .launch_forward = float32::launch_forward,
      .backward_tiles = float32::backward_tiles,
      .backward_ordered_queries = float32::backward_ordered_queries,
      .backward_workspace_bytes = float32::backward_workspace_bytes,
      .launch_backward = float32::launch_backward,
  };
  return kKernels;
}

}  // namespace selfattn::cuda
