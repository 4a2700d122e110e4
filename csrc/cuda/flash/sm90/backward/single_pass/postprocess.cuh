// Behind the main kernel of the single pass: dQ out of its accumulator, transposed back, scaled, rounded. Of long
// problems only for the last section of heads, since background_warps.cuh does the others'.
#pragma once
#include "flash/sm90/backward/intervals.cuh"
#include "flash/sm90/backward/row_stats.cuh"
#include "ptx/launch.cuh"
#include "ptx/transpose.cuh"

namespace selfattn::cuda::sm90 {

// 16 columns of dQ, 8 rows after 8 rows, from the four accumulators of each that this lane had: a warp writes 32 bytes
// a row.
template <class Config>
struct DqRows {
  char* g_row;
  int64_t group_bytes;
  float scale;
  int rows_left;  // of this lane's columns

  __device__ __forceinline__ DqRows(const BackwardParams& p, int head, int first_row, int first_column) {
    const int lane = threadIdx.x % 32, row = first_row + lane / 4;
    const int column = first_column + lane % 2 * 8 + lane % 4 / 2 * 4;  // 4 of them
    g_row = row_address(p.grad_q, head / p.shape.num_heads, row, head % p.shape.num_heads) + column * kRowElementBytes;
    group_bytes = 8 * kRowElementBytes * p.grad_q.stride_token;
    scale = p.scale;
    rows_left = column < p.shape.dim_qk ? p.shape.query_length - row : 0;
  }

  __device__ __forceinline__ void write_group(const float4& sum) {
    using Element = typename Config::Element;
    // Two columns of the lower and two of the upper eight; even lanes trade the upper for their neighbour's lower two.
    const uint32_t low = ptx::transpose_matrix(ptx::pack<Element>(sum.x * scale, sum.y * scale));
    const uint32_t high = ptx::transpose_matrix(ptx::pack<Element>(sum.z * scale, sum.w * scale));
    const bool is_even = threadIdx.x % 2 == 0;
    const uint32_t traded = __shfl_xor_sync(~0u, is_even ? high : low, 1);
    if (rows_left > 0) *reinterpret_cast<uint2*>(g_row) = is_even ? uint2{low, traded} : uint2{traded, high};
    g_row += group_bytes, rows_left -= 8;
  }
};

// A warp takes a slice of a tile.
template <class Config>
__global__ void __launch_bounds__(Config::kPanels * 128)
    flash_attention_backward_postprocess_kernel(const __grid_constant__ BackwardParams p,
                                                const __grid_constant__ BackwardSchedule schedule) {
  constexpr int kGroups = kDqTileRows / 8;
  ptx::wait_for_previous_kernel();
  if (!has_work(p, schedule, BackwardForm::kSinglePass)) return;
  const int slice = threadIdx.x / 32, first_head = schedule.first_head_postprocessed_behind(),
            heads = schedule.kv_groups * schedule.group_size - first_head, filled_rows = schedule.query_blocks;
  for (int job = blockIdx.x; job < heads * filled_rows; job += gridDim.x) {
    const int head = first_head + job % heads, dq_tile_row = job / heads;
    const int64_t dq_tiles = (int64_t(head) * schedule.dq_tile_rows + dq_tile_row) * Config::kPanels;
    const float4* g_sum = reinterpret_cast<const float4*>(schedule.dq_accumulator + dq_tiles * kDqTileFloats) +
                          slice * (kGroups * 32) + threadIdx.x % 32;
    float4 sum[kGroups];
#pragma unroll
    for (int i = 0; i < kGroups; i++) sum[i] = __ldcg(g_sum + i * 32);
    DqRows<Config> rows(p, head, dq_tile_row * kDqTileRows, slice * 16);
#pragma unroll
    for (int i = 0; i < kGroups; i++) rows.write_group(sum[i]);
  }
}

}  // namespace selfattn::cuda::sm90
