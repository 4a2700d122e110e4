// Patches of the float32 sum of dQ (see backward_config.cuh): a warp adds its quarter of one.
#pragma once
#include "../ptx/grid.cuh"
#include "../ptx/reduce.cuh"
#include "../ptx/tma.cuh"
#include "backward_config.cuh"

namespace selfattn::cuda {

constexpr int kQuarterFloats = kPatchFloats / kPatchWarps, kQuarterBytes = kQuarterFloats * 4;
constexpr int kWarpFloats = 32 * 4;  // that a warp moves at once

__device__ __forceinline__ float* quarter_of_patch(const BackwardPlan& plan, int patch, int warp) {
  return plan.grad_q_sum + int64_t(patch) * kPatchFloats + warp * kQuarterFloats;
}

__device__ __forceinline__ void add_quarter(float* g_quarter, int lane, const float (&d)[kPatchRows / 2]) {
#pragma unroll
  for (int i = 0; i < kPatchRows / 8; i++)
    ptx::reduce_add_x4(g_quarter + i * kWarpFloats + lane * 4, d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]);
}

// The same order in shared memory, for the copy engine to add.
__device__ __forceinline__ void store_quarter(float* s_quarter, int lane, const float (&d)[kPatchRows / 2]) {
#pragma unroll
  for (int i = 0; i < kPatchRows / 8; i++) {
    *reinterpret_cast<float4*>(s_quarter + i * kWarpFloats + lane * 4) = {d[4 * i], d[4 * i + 1], d[4 * i + 2],
                                                                          d[4 * i + 3]};
  }
}

// A multiplying warp is through with a key tile: its additions are performed before anyone counts it. Nobody asks for
// those of the last section.
template <bool kAddsByCopyEngine>
__device__ __forceinline__ void report_tile(const BackwardPlan& plan, int section, int lane) {
  __syncwarp();
  if (lane == 0 && plan.has_side_jobs && section < plan.sections - 1) {
    if (kAddsByCopyEngine) ptx::bulk_wait<0>();
    ptx::add_release(plan.tiles_done(section), 1);
  }
}

}  // namespace selfattn::cuda
