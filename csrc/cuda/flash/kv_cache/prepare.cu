// What the kernel cannot find out for itself: zeroed counters, always; the tokens of each row, where ids name the rows;
// and the shares, where there are many tiles. One thread block, which the kernel need not wait for where it only
// clears.
#include "prepare.h"

#include "ptx/launch.cuh"
#include "row_tokens.cuh"

namespace selfattn::cuda::kv_cache {
namespace {

constexpr int kClearThreads = 256;

// Tokens by their rows, and the tiles of all rows.
__device__ int sort_tokens(const KernelParams& p, int* s_sums) {
  const KvCacheParams& call = p.call;
  const ScheduleParams& schedule = p.schedule;
  const RowTokens tokens{call.segment_ids,     schedule.queries,      call.batch * call.queries, call.rows,
                         schedule.token_order, schedule.token_counts, schedule.token_starts};
  int tiles = 0;
  tokens.sort(s_sums, [&](int row, int start, int count) {
    const int rows = row < call.rows ? count * schedule.group.value : 0;  // of tiles
    const int row_tiles = (rows + schedule.tile_rows - 1) / schedule.tile_rows;
    const int first_tile = sum_before(row_tiles, tiles, s_sums);
    for (int i = 0; i < row_tiles; i++) schedule.entries[first_tile + i] = {row, i * schedule.tile_rows, start, count};
  });
  return tiles;
}

__global__ void __launch_bounds__(kPrepareThreads) prepare_kv_cache_kernel(const __grid_constant__ KernelParams p) {
  __shared__ int s_sums[kPrepareWarps], s_least, s_most;
  ptx::launch_dependents();
  const ScheduleParams& schedule = p.schedule;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < schedule.thread_blocks; i += static_cast<int>(blockDim.x)) schedule.counters[i] = 0;
  if (!schedule.is_prepared) return;

  const int tiles = p.call.segment_ids ? sort_tokens(p, s_sums) : schedule.tiles;
  int total = 0, least = INT_MAX, most = 0;
  for (int first = 0; first < tiles; first += kPrepareThreads) {
    const int tile = first + thread, count = tile < tiles ? count_of(p, describe_tile(p, tile)) : 0;
    const int before = sum_before(count, total, s_sums);
    if (tile >= tiles) continue;
    schedule.tile_counts_before[tile] = before;
    least = ::min(least, count), most = ::max(most, count);
  }
  if (thread == 0) s_least = INT_MAX, s_most = 0;
  __syncthreads();
  atomicMin(&s_least, least), atomicMax(&s_most, most);
  __syncthreads();
  const int of_tile = s_least == s_most ? s_most : 0;
  if (thread == 0) *schedule.totals = {total, of_tile};
  for (int part = thread; part < schedule.thread_blocks; part += kPrepareThreads) {
    const Share share = cut_share(p, total, of_tile, part);
    if (share.begin == share.end || share.stride > 0) continue;
    int low = 0, high = tiles - 1;  // the last tile that begins at or before the share
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (schedule.tile_counts_before[middle] <= share.begin)
        low = middle;
      else
        high = middle - 1;
    }
    schedule.starts[part] = {low, schedule.tile_counts_before[low]};
  }
}

}  // namespace

cudaError_t launch_prepare_kv_cache(const KernelParams& params, cudaStream_t stream) {
  prepare_kv_cache_kernel<<<1, params.schedule.is_prepared ? kPrepareThreads : kClearThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace selfattn::cuda::kv_cache
