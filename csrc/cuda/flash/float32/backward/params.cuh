// What the float32 backward kernels are told.
#pragma once
#include "flash/sm80/backward/segments.cuh"
#include "flash/tile/tile_order.cuh"

namespace selfattn::cuda::float32 {

using sm80::blocks_of, sm80::RowSegments, sm80::segments_of_row, sm80::tile_of_blocks, sm80::visible_keys,
    sm80::visible_queries, sm80::WarpReach;

struct BackwardKernelParams {
  BackwardParams call;
  TileSchedule of_queries, of_keys;  // of the kernel for dQ, by query heads; of that for dK and dV, by key heads
  // (batch, num_heads, stat_pitch) the statistics of the rows (row_stats.cuh), in the workspace; rows past the end up
  // to the pitch, a multiple of kStatRows, have some as well.
  float *lse, *delta;
  int stat_pitch;
};

}  // namespace selfattn::cuda::float32
