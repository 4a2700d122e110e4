// Patches of the float32 sum of dQ (see backward_config.cuh): a warp adds its quarter of one.
#pragma once
#include "../ptx/grid.cuh"
#include "../ptx/reduce.cuh"
#include "backward_config.cuh"

namespace selfattn::cuda {

__device__ __forceinline__ void add_patch(const BackwardPlan& plan, int patch, int warp, int lane,
                                          const float (&d)[kPatchRows / 2]) {
  float* g_sum = plan.grad_q_sum + int64_t(patch) * kPatchFloats + warp * (kPatchFloats / kPatchWarps) + lane * 4;
#pragma unroll
  for (int i = 0; i < kPatchRows / 8; i++)
    ptx::reduce_add_x4(g_sum + i * 128, d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]);
}

// A multiplying warp is through with a key tile: its additions are performed before anyone counts it. Nobody asks for
// those of the last section.
__device__ __forceinline__ void report_tile(const BackwardPlan& plan, int section, int lane) {
  __syncwarp();
  if (lane == 0 && plan.has_side_jobs && section < plan.sections - 1) ptx::add_release(plan.tiles_done(section), 1);
}

}  // namespace selfattn::cuda
