// Tiles of the float32 accumulator of dQ (see config.cuh): a warp adds its slice of one.
#pragma once
#include "flash/sm90/backward/config.cuh"
#include "flash/sm90/backward/schedule.cuh"
#include "ptx/grid.cuh"
#include "ptx/reduce.cuh"
#include "ptx/tma.cuh"

namespace selfattn::cuda::sm90 {

constexpr int kSliceFloats = kDqTileFloats / kDqTileWarps, kSliceBytes = kSliceFloats * 4;
constexpr int kWarpFloats = 32 * 4;  // that a warp moves at once

__device__ __forceinline__ float* slice_of_dq_tile(const BackwardSchedule& schedule, int dq_tile, int warp) {
  return schedule.dq_accumulator + int64_t(dq_tile) * kDqTileFloats + warp * kSliceFloats;
}

__device__ __forceinline__ void add_slice(float* g_slice, int lane, const float (&d)[kDqTileRows / 2]) {
#pragma unroll
  for (int i = 0; i < kDqTileRows / 8; i++)
    ptx::reduce_add_x4(g_slice + i * kWarpFloats + lane * 4, d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]);
}

// The same order in shared memory, for TMA to add.
__device__ __forceinline__ void store_slice(float* s_slice, int lane, const float (&d)[kDqTileRows / 2]) {
#pragma unroll
  for (int i = 0; i < kDqTileRows / 8; i++) {
    *reinterpret_cast<float4*>(s_slice + i * kWarpFloats + lane * 4) = {d[4 * i], d[4 * i + 1], d[4 * i + 2],
                                                                        d[4 * i + 3]};
  }
}

// A consumer warp is through with a key tile: its additions are performed before anyone counts it. Nobody asks for
// those of the last section.
template <bool kAddsByTma>
__device__ __forceinline__ void report_tile(const BackwardSchedule& schedule, int section, int lane) {
  __syncwarp();
  if (lane == 0 && schedule.has_background_warps && section < schedule.sections - 1) {
    if (kAddsByTma) ptx::bulk_wait<0>();
    ptx::add_release(schedule.tiles_done(section), 1);
  }
}

}  // namespace selfattn::cuda::sm90
