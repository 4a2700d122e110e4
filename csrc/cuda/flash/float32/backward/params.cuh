// What the float32 backward kernels are told.
#pragma once
#include "flash/tile/key_blocks.cuh"
#include "flash/tile/row_segments.cuh"
#include "flash/tile/tile_order.cuh"

namespace selfattn::cuda::float32 {

struct BackwardKernelParams {
  BackwardParams call;
  TileSchedule of_queries, of_keys;  // of the kernel for dQ, by query heads; of that for dK and dV, by key heads
  // (batch, num_heads, stat_pitch) the statistics of the rows (row_stats.cuh), in the workspace; rows past the end up
  // to the pitch, a multiple of kStatRows, have some as well.
  float *lse, *delta;
  int stat_pitch;
};

// The tile whose turn it is by an order of the tables; past the end of the row there may be none. tiles: of a head.
template <class Table>
__device__ __forceinline__ int ordered_tile(const int* order, int batch, int tiles, int rank) {
  return order[(batch * tiles + rank) / Table::kTilesTogether] * Table::kTilesTogether + rank % Table::kTilesTogether;
}

}  // namespace selfattn::cuda::float32
