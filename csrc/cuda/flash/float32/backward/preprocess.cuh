// Ahead of the other kernels: the statistics of the rows of queries (row_stats.cuh). It is the only one that reads O,
// so dQ may be written over it.
#pragma once
#include "config.h"
#include "flash/float32/precision.cuh"
#include "params.cuh"
#include "row_stats.cuh"

namespace selfattn::cuda::float32 {

constexpr int kPreprocessThreads = 256, kLanesOfRow = 16, kRowsAtOnce = kPreprocessThreads / kLanesOfRow;

inline int preprocess_blocks(const BackwardKernelParams& p) {
  return p.call.shape.batch * p.call.shape.num_heads * (p.stat_pitch / kStatRows);
}

// A thread block has kStatRows rows of a head; kLanesOfRow lanes share a row. delta stands for the sum of P dP over a
// row, and dP is made of rounded dO in "tf32": so dO is rounded here, too, or what should cancel would not (in a row of
// one key all of it).
template <Precision kPrecision, RowLayout kLayout>
__global__ void __launch_bounds__(kPreprocessThreads)
    flash_attention_backward_preprocess_kernel(const __grid_constant__ BackwardKernelParams p) {
  const AttentionShape& shape = p.call.shape;
  const int blocks_of_head = p.stat_pitch / kStatRows;
  const int head_of_all = blockIdx.x / blocks_of_head, batch = head_of_all / shape.num_heads,
            head = head_of_all % shape.num_heads;
  const int first_row = blockIdx.x % blocks_of_head * kStatRows + threadIdx.x / kLanesOfRow;
  const int first_column = threadIdx.x % kLanesOfRow * kChunkElements;
  const float *g_out = head_of(p.call.out, batch, head), *g_grad_out = head_of(p.call.grad_out, batch, head);
#pragma unroll 4
  for (int round = 0; round < kStatRows / kRowsAtOnce; round++) {
    const int row = first_row + round * kRowsAtOnce;
    const bool is_there = row < shape.query_length;
    float delta = 0.f;
#pragma unroll 1
    for (int column = first_column; is_there && column < shape.dim_v; column += kLanesOfRow * kChunkElements) {
      const float4 a = load_row_chunk<kLayout, float4>(g_out + row * p.call.out.stride_token + column,
                                                       shape.dim_v - column),
                   b = load_row_chunk<kLayout, float4>(g_grad_out + row * p.call.grad_out.stride_token + column,
                                                       shape.dim_v - column);
      const auto rounded = [](float x) {
        return kPrecision == Precision::kTf32 && !is_exceptional(x) ? round_to_tf32(x) : x;
      };
      delta = fmaf(a.x, rounded(b.x), fmaf(a.y, rounded(b.y), fmaf(a.z, rounded(b.z), fmaf(a.w, rounded(b.w), delta))));
    }
#pragma unroll
    for (int distance = kLanesOfRow / 2; distance; distance /= 2) delta += __shfl_xor_sync(~0u, delta, distance);
    if (first_column != 0) continue;
    const int64_t place = int64_t(head_of_all) * shape.query_length + row;
    if (is_there && p.call.grad_lse) delta -= p.call.grad_lse[place];
    const RowStats stats = make_row_stats(is_there ? p.call.lse[place] : -infinity(), delta);
    const int64_t stat = int64_t(head_of_all) * p.stat_pitch + row;
    p.lse[stat] = stats.lse, p.delta[stat] = stats.delta;
  }
}

}  // namespace selfattn::cuda::float32
