// What the kernel cannot find out for itself: zeroed counters, always; the tokens of each row, where ids name the rows;
// and the shares, where there are many tiles. One thread block, which the kernel need not wait for where it only
// clears.
#include "prepare.h"

#include "ptx/launch.cuh"

namespace selfattn::cuda::kv_cache {
namespace {

constexpr int kClearThreads = 256, kPrepareThreads = 1024, kPrepareWarps = kPrepareThreads / kWarpSize;

// By the whole thread block: the sum of the values of the threads before this one, and `total` grows by that of all.
__device__ int sum_before(int value, int& total, int* s_sums) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  int up_to = value;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int before = __shfl_up_sync(~0u, up_to, distance);
    if (lane >= distance) up_to += before;
  }
  if (lane == kWarpSize - 1) s_sums[warp] = up_to;
  __syncthreads();
  int before = total;
  for (int other = 0; other < kPrepareWarps; other++) {
    if (other < warp) before += s_sums[other];
    total += s_sums[other];
  }
  __syncthreads();
  return before + up_to - value;
}

// Tokens in the order of their rows, those of a row in the call's order, and the tiles of all rows. The tokens of no
// row make up one more.
__device__ int sort_tokens(const KernelParams& p, int* s_sums) {
  const KvCacheParams& call = p.call;
  const ScheduleParams& schedule = p.schedule;
  const int tokens = call.batch * call.queries, thread = static_cast<int>(threadIdx.x);
  const auto row_of = [&](int token) {
    const int64_t id = call.segment_ids.at(token / schedule.queries, token - token / schedule.queries * call.queries);
    assert(id < call.rows && "segment ids must name rows of the cache");
    return id < 0 ? call.rows : static_cast<int>(id);
  };
  for (int row = thread; row <= call.rows; row += kPrepareThreads) schedule.token_counts[row] = 0;
  __syncthreads();
  for (int token = thread; token < tokens; token += kPrepareThreads)
    atomicAdd(schedule.token_counts + row_of(token), 1);
  __syncthreads();

  int tokens_before = 0, tiles = 0;
  for (int first = 0; first <= call.rows; first += kPrepareThreads) {
    const int row = first + thread, count = row <= call.rows ? schedule.token_counts[row] : 0;
    const int row_tiles = (count * schedule.group.value + schedule.tile_rows - 1) / schedule.tile_rows;
    const int start = sum_before(count, tokens_before, s_sums), first_tile = sum_before(row_tiles, tiles, s_sums);
    if (row <= call.rows) schedule.token_starts[row] = start;
    for (int i = 0; i < row_tiles; i++) schedule.entries[first_tile + i] = {row, i * schedule.tile_rows, start, count};
  }
  __syncthreads();

  // Warp after warp, so that tokens stay in order. token_starts: of the tokens yet to come.
  for (int first = 0; first < tokens; first += kPrepareThreads) {
    const int token = first + thread;
    const int row = token < tokens ? row_of(token) : -1;
    for (int warp = 0; warp < kPrepareWarps && first + warp * kWarpSize < tokens; warp++) {
      if (thread / kWarpSize == warp) {
        const unsigned same = __match_any_sync(~0u, row);
        const int rank = __popc(same & ((1u << thread % kWarpSize) - 1));
        const int start = row >= 0 ? schedule.token_starts[row] : 0;
        __syncwarp();
        if (row >= 0) {
          schedule.token_order[start + rank] = token;
          if (rank == 0) schedule.token_starts[row] = start + __popc(same);
        }
      }
      __syncthreads();
    }
  }
  return tiles;
}

__global__ void __launch_bounds__(kPrepareThreads) prepare_kv_cache_kernel(const __grid_constant__ KernelParams p) {
  __shared__ int s_sums[kPrepareWarps];
  ptx::launch_dependents();
  const ScheduleParams& schedule = p.schedule;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < schedule.thread_blocks; i += static_cast<int>(blockDim.x)) schedule.counters[i] = 0;
  if (!schedule.is_prepared) return;

  const int tiles = p.call.segment_ids ? sort_tokens(p, s_sums) : schedule.tiles;
  int total = 0;
  for (int first = 0; first < tiles; first += kPrepareThreads) {
    const int tile = first + thread, count = tile < tiles ? count_of(p, describe_tile(p, tile)) : 0;
    const int before = sum_before(count, total, s_sums);
    if (tile < tiles) schedule.tile_counts_before[tile] = before;
  }
  __syncthreads();
  if (thread == 0) *schedule.total = total;
  for (int part = thread; part < schedule.thread_blocks; part += kPrepareThreads) {
    const Share share = cut_share(p, total, part);
    if (share.begin == share.end) continue;
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
