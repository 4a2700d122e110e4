// Which tiles a tile of the backward kernels meets (flash/tile/row_segments.cuh: which tokens a token).
#pragma once
#include "config.cuh"
#include "flash/tile/key_blocks.cuh"
#include "flash/tile/row_segments.cuh"
#include "schedule.cuh"

namespace selfattn::cuda::sm90 {

// The query tiles that key tile `tile` meets, ids aside.
template <class Config>
__device__ __forceinline__ Interval query_tiles_of(const BackwardParams& p, int batch, bool has_runs, int tile) {
  const int first = tile * Config::kTileKv, last = min(first + Config::kTileKv, p.shape.key_length) - 1;
  const int begin = visible_queries(p, batch, has_runs, first).begin,
            end = visible_queries(p, batch, has_runs, last).end;
  return begin < end ? Interval{begin / Config::kTileQ, (end + Config::kTileQ - 1) / Config::kTileQ} : Interval{0, 0};
}

// Whether kernels of `form` have work. Called by whole warps, behind the wait for the kernel ahead.
__device__ __forceinline__ bool has_work(const BackwardParams& p, const BackwardSchedule& schedule, BackwardForm form) {
  if (schedule.form != BackwardForm::kEither) return true;
  long long computed_blocks = 0;
  for (int b = threadIdx.x % 32; b < schedule.batches_counted; b += 32)
    computed_blocks += p.segments.computed_blocks[b];
#pragma unroll
  for (int distance = 16; distance; distance /= 2) computed_blocks += __shfl_xor_sync(~0u, computed_blocks, distance);
  return (computed_blocks <= schedule.max_blocks_of_two_pass) == (form == BackwardForm::kTwoPass);
}

// What is known of the segments in a query tile: one block of the tables, or two together.
template <int kTileQ>
__device__ __forceinline__ SegmentBlock query_block(const BackwardParams& p, const BackwardSchedule& schedule,
                                                    int batch, int tile) {
  constexpr int kBlocks = kTileQ / kQueryBlock;
  const SegmentBlock* g_blocks = p.segments.query_blocks + int64_t(batch) * schedule.query_blocks;
  return tile_of_blocks<kBlocks>(g_blocks, tile * kBlocks, schedule.query_blocks);
}

}  // namespace selfattn::cuda::sm90
