// What happens to rows of queries before and after their products:
//   prepare  lse * log2(e), delta = rowsum(dO * O) - dlse, and the cleared sum of dQ
//   finish   dQ out of its sum: transposed back, scaled, rounded
// Two small kernels do this; of long problems, only for the first and for the last section of heads
// (backward_side_jobs.cuh).
#pragma once
#include "../ptx/arithmetic.cuh"
#include "../ptx/launch.cuh"
#include "../ptx/transpose.cuh"
#include "backward_config.cuh"
#include "backward_exceptional.cuh"
#include "backward_visible.cuh"

namespace selfattn::cuda {

template <class Element>
__device__ __forceinline__ float dot(const uint4& a, const uint4& b) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 x = ptx::unpack<Element>((&a.x)[i]), y = ptx::unpack<Element>((&b.x)[i]);
    sum = fmaf(x.x, y.x, fmaf(x.y, y.y, sum));
  }
  return sum;
}

constexpr int kRowElementBytes = 2;

__device__ __forceinline__ char* row_address(const TensorView& view, int batch, int token, int head) {
  return static_cast<char*>(view.data) +
         kRowElementBytes * (batch * view.stride_batch + token * view.stride_token + head * view.stride_head);
}

// Any bit but the signs': whether a chunk of a row is not zero.
__device__ __forceinline__ unsigned magnitude_bits(const uint4& chunk) {
  return (chunk.x | chunk.y | chunk.z | chunk.w) & 0x7fff7fffu;
}

template <class Element>
__device__ __forceinline__ bool is_query_finite(const BackwardParams& p, int head, int row) {
  const char* g_row = row_address(p.q, head / p.shape.num_heads, row, head % p.shape.num_heads);
  ptx::FiniteTest<Element> test;
#pragma unroll 1
  for (int i = 0; i < p.shape.dim_qk * kRowElementBytes; i += sizeof(uint4)) {
    const uint4 chunk = *reinterpret_cast<const uint4*>(g_row + i);
    test.add(chunk.x), test.add(chunk.y), test.add(chunk.z), test.add(chunk.w);
  }
  return test.all_finite();
}

// The statistic of a row that stands for its lse (backward_exceptional.cuh) and its delta, from its lse (-inf past the
// end) and its sum of dO * O; `head` counts over all batches. Rows that see no key, or whose sink has all the weight,
// get +inf, which makes every P of theirs zero; rows that are not finite get NaN. Where a sink hides that a row sees no
// key, its output is zero: only then need its query be looked at, which lse otherwise tells of. `is_query_bad` says
// whether both are so.
template <class Test>
__device__ __forceinline__ float2 row_stats(const BackwardParams& p, int head, int row, float lse, float sum,
                                            const Test& is_query_bad) {
  if (fabsf(lse) == INFINITY) return {INFINITY, 0.f};
  const float delta = p.grad_lse ? sum - p.grad_lse[int64_t(head) * p.shape.query_length + row] : sum;
  if (!is_finite(lse) || !is_finite(delta)) return {NAN, 0.f};
  if (is_query_bad()) return {NAN, 0.f};
  return {finite_stat(lse), delta};
}

// Whether there is nothing to row_stats but {lse * log2(e), sum}, as long as there is no grad_lse.
__device__ __forceinline__ bool is_ordinary_row(float lse, float sum, bool is_out_zero) {
  return fabsf(lse * kLog2E) < kFirstExactStat && is_finite(sum) && !is_out_zero;
}

__device__ __forceinline__ void store_row_stats(const BackwardPlan& plan, int head, int row, float2 stats) {
  float* g_stats =
      plan.row_stats + (int64_t(head) * plan.stat_groups + row / kStatRows) * kStatFloats + row % kStatRows;
  g_stats[0] = stats.x, g_stats[kStatRows] = stats.y;
}

// 16 columns of dQ, 8 rows after 8 rows, from the four accumulators of each that this lane had: a warp writes 32 bytes
// a row.
template <class Config>
struct FinishedRows {
  char* g_row;
  int64_t group_bytes;
  float scale;
  int rows_left;  // of this lane's columns

  __device__ __forceinline__ FinishedRows(const BackwardParams& p, int head, int first_row, int first_column) {
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

constexpr int kRowWarps = 8;

// 64 rows of a head, by a thread block.
template <class Config>
__device__ __forceinline__ void prepare_rows(const BackwardParams& p, const BackwardPlan& plan, int head,
                                             int patch_row) {
  constexpr int kThreads = kRowWarps * 32, kLanes = Config::kHeadDim / 8,
                kRowsAtOnce = kThreads / kLanes;  // 8 columns a lane
  constexpr int kRounds = kPatchRows / kRowsAtOnce;
  const int column = threadIdx.x % kLanes * 8;
  const int first_row = patch_row * kPatchRows + threadIdx.x / kLanes;
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
  if (patch_row < plan.patch_rows) {
    const int64_t patches = (int64_t(head) * plan.patch_rows + patch_row) * Config::kPanels;
    float4* g_sum = reinterpret_cast<float4*>(plan.grad_q_sum + patches * kPatchFloats);
#pragma unroll
    for (int i = threadIdx.x; i < Config::kPanels * kPatchFloats / 4; i += kThreads) g_sum[i] = float4{};
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
      store_row_stats(plan, head, row, row_stats(p, head, row, lse, sum, is_query_bad));
    }
  }
  if (p.is_deterministic && threadIdx.x == 0 && patch_row < plan.patch_rows &&
      patch_row % Config::kPatchRowsOfTile == 0) {
    plan.turns[int64_t(head) * plan.query_tiles + patch_row / Config::kPatchRowsOfTile] = 0;
  }
}

template <class Config>
__global__ void __launch_bounds__(kRowWarps * 32)
    flash_attention_backward_prepare_kernel(const __grid_constant__ BackwardParams p,
                                            const __grid_constant__ BackwardPlan plan) {
  ptx::launch_dependents();
  ptx::wait_for_previous_kernel();
  if (!has_work(p, plan, BackwardForm::kFused)) return;
  const int heads = plan.heads_prepared_ahead();
  for (int job = blockIdx.x; job < heads * plan.stat_groups; job += gridDim.x)
    prepare_rows<Config>(p, plan, job % heads, job / heads);
  if (blockIdx.x == 0) {
    for (int i = threadIdx.x; i < plan.count_of_counters(); i += kRowWarps * 32) plan.counters[i] = 0;
  }
}

// A warp takes a quarter of a patch.
template <class Config>
__global__ void __launch_bounds__(Config::kPanels * 128)
    flash_attention_backward_finish_kernel(const __grid_constant__ BackwardParams p,
                                           const __grid_constant__ BackwardPlan plan) {
  constexpr int kGroups = kPatchRows / 8;
  ptx::wait_for_previous_kernel();
  if (!has_work(p, plan, BackwardForm::kFused)) return;
  const int quarter = threadIdx.x / 32, first_head = plan.first_head_finished_behind(),
            heads = plan.pairs * plan.group - first_head, filled_rows = plan.query_blocks;
  for (int job = blockIdx.x; job < heads * filled_rows; job += gridDim.x) {
    const int head = first_head + job % heads, patch_row = job / heads;
    const int64_t patches = (int64_t(head) * plan.patch_rows + patch_row) * Config::kPanels;
    const float4* g_sum = reinterpret_cast<const float4*>(plan.grad_q_sum + patches * kPatchFloats) +
                          quarter * (kGroups * 32) + threadIdx.x % 32;
    float4 sum[kGroups];
#pragma unroll
    for (int i = 0; i < kGroups; i++) sum[i] = __ldcg(g_sum + i * 32);
    FinishedRows<Config> rows(p, head, patch_row * kPatchRows, quarter * 16);
#pragma unroll
    for (int i = 0; i < kGroups; i++) rows.write_group(sum[i]);
  }
}

}  // namespace selfattn::cuda
