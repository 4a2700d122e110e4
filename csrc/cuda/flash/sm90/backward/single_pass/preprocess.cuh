// Before the main kernel of the single pass: the statistics of query rows, and a cleared accumulator of dQ. Of long
// problems only for the first section of heads, since background_warps.cuh does the others'.
#pragma once
#include "flash/sm90/backward/intervals.cuh"
#include "flash/sm90/backward/row_stats.cuh"
#include "ptx/launch.cuh"

namespace selfattn::cuda::sm90 {

constexpr int kRowWarps = 8;

// 64 rows of a head, by a thread block.
template <class Config>
__device__ __forceinline__ void preprocess_rows(const BackwardParams& p, const BackwardSchedule& schedule, int head,
                                                int dq_tile_row) {
  constexpr int kThreads = kRowWarps * 32, kLanes = Config::kHeadDim / 8,
                kRowsAtOnce = kThreads / kLanes;  // 8 columns a lane
  constexpr int kRounds = kDqTileRows / kRowsAtOnce;
  const int column = threadIdx.x % kLanes * 8;
  const int first_row = dq_tile_row * kDqTileRows + threadIdx.x / kLanes;
  uint4 out[kRounds], grad_out[kRounds];
#pragma unroll
  for (int i = 0; i < kRounds; i++) {
    const int row = first_row + i * kRowsAtOnce, batch = head / p.shape.num_heads,
              head_of_batch = head % p.shape.num_heads;
    const bool exists = row < p.shape.query_length && column < p.shape.dim_v;
    const int offset = column * kRowElementBytes;
    out[i] = exists ? __ldg(reinterpret_cast<const uint4*>(row_address(p.out, batch, row, head_of_batch) + offset))
                    : uint4{};
    grad_out[i] =
        exists ? __ldg(reinterpret_cast<const uint4*>(row_address(p.grad_out, batch, row, head_of_batch) + offset))
               : uint4{};
  }
  if (dq_tile_row < schedule.dq_tile_rows) {
    const int64_t dq_tiles = (int64_t(head) * schedule.dq_tile_rows + dq_tile_row) * Config::kPanels;
    float4* g_sum = reinterpret_cast<float4*>(schedule.dq_accumulator + dq_tiles * kDqTileFloats);
#pragma unroll
    for (int i = threadIdx.x; i < Config::kPanels * kDqTileFloats / 4; i += kThreads) g_sum[i] = float4{};
  }
#pragma unroll
  for (int i = 0; i < kRounds; i++) {
    float sum = dot<typename Config::Element>(out[i], grad_out[i]);
    unsigned bits = magnitude_bits(out[i]);
#pragma unroll
    for (int distance = kLanes / 2; distance; distance /= 2) {
      sum += __shfl_xor_sync(~0u, sum, distance);
      bits |= __shfl_xor_sync(~0u, bits, distance);
    }
    if (column == 0) {
      const int row = first_row + i * kRowsAtOnce;
      const float lse = row < p.shape.query_length ? p.lse[int64_t(head) * p.shape.query_length + row] : -INFINITY;
      const auto is_query_bad = [&] { return bits == 0 && !is_query_finite<typename Config::Element>(p, head, row); };
      store_row_stats(schedule, head, row, row_stats(p, head, row, lse, sum, is_query_bad));
    }
  }
  if (p.is_deterministic && threadIdx.x == 0 && dq_tile_row < schedule.dq_tile_rows &&
      dq_tile_row % Config::kDqTileRowsPerTile == 0) {
    schedule.dq_semaphores[int64_t(head) * schedule.query_tiles + dq_tile_row / Config::kDqTileRowsPerTile] = 0;
  }
}

template <class Config>
__global__ void __launch_bounds__(kRowWarps * 32)
    flash_attention_backward_preprocess_kernel(const __grid_constant__ BackwardParams p,
                                               const __grid_constant__ BackwardSchedule schedule) {
  ptx::launch_dependents();
  ptx::wait_for_previous_kernel();
  if (!has_work(p, schedule, BackwardForm::kSinglePass)) return;
  const int heads = schedule.heads_preprocessed_ahead();
  for (int job = blockIdx.x; job < heads * schedule.stat_groups; job += gridDim.x)
    preprocess_rows<Config>(p, schedule, job % heads, job / heads);
  if (blockIdx.x == 0) {
    for (int i = threadIdx.x; i < schedule.count_of_counters(); i += kRowWarps * 32) schedule.counters[i] = 0;
  }
}

}  // namespace selfattn::cuda::sm90
