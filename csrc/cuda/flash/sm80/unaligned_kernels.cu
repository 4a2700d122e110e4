// The kernels for 16-bit elements in rows that are no multiple of 16 bytes, of every card since Ampere, Hopper
// included: those of the family sm80, with loads and stores of their own (flash/tile/unaligned_chunk.cuh). They are
// compiled for more architectures than the others of the family (cmake/cuda_kernels.cmake).
#include "flash/kernels.h"

#include "backward/dispatch.h"
#include "flash/segments/tables.h"
#include "forward/dispatch.h"
#include "host/device.h"

namespace selfattn::cuda {
namespace {

// Compiled for the architectures of these kernels: where it can run, the others can.
__global__ void unaligned_family_probe_kernel() {}

}  // namespace

const FlashKernels& unaligned_kernels() {
  static constexpr FlashKernels kKernels = {
      .name = "unaligned",
      .min_capability = 80,
      .max_capability = kNewest,
      .is_of_float32 = false,
      .is_of_unaligned = true,
      .reads_pages = false,
      .limits = {.max_head_dim = 256,
                 .max_length = 1 << 29,  // positions and windows are counted in 32 bits
                 .max_packed_length = kMaxSegmentLength},
      .is_built_for = is_built_for<unaligned_family_probe_kernel>,
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
