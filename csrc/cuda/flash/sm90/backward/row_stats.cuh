// The statistics of query rows that every backward kernel reads: lse * log2(e) and delta = rowsum(dO * O) - dlse
// (kStatFloats), NaN or infinity for rows out of the ordinary (exceptional.cuh).
#pragma once
#include "config.cuh"
#include "exceptional.cuh"
#include "ptx/arithmetic.cuh"
#include "schedule.cuh"

namespace selfattn::cuda::sm90 {

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

// The statistic of a row that stands for its lse (exceptional.cuh) and its delta, from its lse (-inf past the
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

__device__ __forceinline__ float* row_stats_address(const BackwardSchedule& schedule, int head, int row) {
  return schedule.row_stats + (int64_t(head) * schedule.stat_groups + row / kStatRows) * kStatFloats + row % kStatRows;
}

__device__ __forceinline__ void store_row_stats(const BackwardSchedule& schedule, int head, int row, float2 stats) {
  float* g_stats = row_stats_address(schedule, head, row);
  g_stats[0] = stats.x, g_stats[kStatRows] = stats.y;
}

__device__ __forceinline__ float2 load_row_stats(const BackwardSchedule& schedule, int head, int row) {
  const float* g_stats = row_stats_address(schedule, head, row);
  return {g_stats[0], g_stats[kStatRows]};
}

}  // namespace selfattn::cuda::sm90
