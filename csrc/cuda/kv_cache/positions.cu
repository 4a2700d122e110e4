// The launch of kv_cache_positions and positions_of_append.
#include "positions.cuh"

#include <algorithm>

#include "host/device.h"

namespace selfattn::cuda {
namespace {

constexpr int kMostBlocks = 1 << 12;  // of a launch; they take more rows and tokens in turn

int ceil_div(int count, int size) { return (count + size - 1) / size; }

}  // namespace

bool kv_cache_positions_run_on(int device) { return is_built_for<kv_cache_positions_kernel>(device); }

cudaError_t launch_kv_cache_positions(const PositionsParams& params, cudaStream_t stream) {
  if (params.rows == 0) return cudaSuccess;  // and so no tokens
  const bool is_order_needed = params.segment_ids && (!params.given || params.lengths_after);
  if (is_order_needed) {
    const int stretches = std::clamp(ceil_div(params.tokens, kStretchTokens), 1, kMostStretches);
    const int blocks = std::min(params.rows, kMostBlocks);
    ragged_kv_cache_positions_kernel<<<blocks, stretches * kWarpSize, 0, stream>>>(params);
  } else {
    const int blocks = ceil_div(std::max(params.rows, params.tokens), kPositionThreads);
    kv_cache_positions_kernel<<<std::min(blocks, kMostBlocks), kPositionThreads, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

}  // namespace selfattn::cuda
