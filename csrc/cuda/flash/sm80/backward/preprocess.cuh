// Ahead of the other kernels: the statistics of the rows of queries (row_stats.cuh). It is the only one that reads O,
// so dQ may be written over it.
#pragma once
#include "params.cuh"
#include "products.cuh"
#include "row_stats.cuh"

namespace selfattn::cuda::sm80 {

constexpr int kPreprocessThreads = 256;

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

template <class Element, RowLayout kLayout>
__device__ __noinline__ bool is_query_finite(const BackwardKernelParams& p, int batch, int head, int row) {
  const uint16_t* g_row = head_of(p.call.q, batch, head) + row * p.call.q.stride_token;
  ptx::FiniteTest<Element> finite;
#pragma unroll 1
  for (int column = 0; column < p.call.shape.dim_qk; column += kChunkElements) {
    const uint4 chunk = load_row_chunk<kLayout, uint4>(g_row + column, p.call.shape.dim_qk - column);
    finite.add(chunk.x), finite.add(chunk.y), finite.add(chunk.z), finite.add(chunk.w);
  }
  return finite.all_finite();
}

// A thread block has kStatRows rows of a head; kLanes lanes share a row, 8 columns each.
template <class Element, int kLanes, RowLayout kLayout>
__global__ void __launch_bounds__(kPreprocessThreads)
    flash_attention_backward_preprocess_kernel(const __grid_constant__ BackwardKernelParams p) {
  constexpr int kRowsAtOnce = kPreprocessThreads / kLanes, kRounds = kStatRows / kRowsAtOnce;
  const AttentionShape& shape = p.call.shape;
  const int blocks_of_head = p.stat_pitch / kStatRows;
  const int head_of_all = blockIdx.x / blocks_of_head, batch = head_of_all / shape.num_heads,
            head = head_of_all % shape.num_heads;
  const int first_row = blockIdx.x % blocks_of_head * kStatRows + threadIdx.x / kLanes;
  const int column = threadIdx.x % kLanes * kChunkElements;
  const uint16_t* g_out = head_of(p.call.out, batch, head) + column;
  const uint16_t* g_grad_out = head_of(p.call.grad_out, batch, head) + column;
  constexpr int kRoundsAtOnce = kRounds < 4 ? kRounds : 4;
#pragma unroll 1
  for (int base = 0; base < kRounds; base += kRoundsAtOnce) {
    uint4 out[kRoundsAtOnce], grad_out[kRoundsAtOnce];
#pragma unroll
    for (int i = 0; i < kRoundsAtOnce; i++) {
      const int64_t row = first_row + (base + i) * kRowsAtOnce;
      const bool is_there = row < shape.query_length && column < shape.dim_v;
      const int columns = shape.dim_v - column;
      out[i] = is_there ? load_row_chunk<kLayout, uint4>(g_out + row * p.call.out.stride_token, columns) : uint4{};
      grad_out[i] =
          is_there ? load_row_chunk<kLayout, uint4>(g_grad_out + row * p.call.grad_out.stride_token, columns) : uint4{};
    }
#pragma unroll
    for (int i = 0; i < kRoundsAtOnce; i++) {
      float delta = dot<Element>(out[i], grad_out[i]);
#pragma unroll
      for (int distance = kLanes / 2; distance; distance /= 2) delta += __shfl_xor_sync(~0u, delta, distance);
      if (column != 0) continue;
      const int row = first_row + (base + i) * kRowsAtOnce;
      const int64_t place = int64_t(head_of_all) * shape.query_length + row;
      const bool is_there = row < shape.query_length, may_see_nothing = delta == 0.f;
      if (is_there && p.call.grad_lse) delta -= p.call.grad_lse[place];
      const float lse = is_there ? p.call.lse[place] : -infinity();
      RowStats stats = make_row_stats(lse, delta);
      // Where a sink hides that a row sees no key its output is 0, and nothing has told of its query yet.
      if (is_there && may_see_nothing && is_finite(lse) && !is_query_finite<Element, kLayout>(p, batch, head, row))
        stats = {NAN, 0.f};
      const int64_t stat = int64_t(head_of_all) * p.stat_pitch + row;
      p.lse_log2[stat] = stats.lse_log2, p.delta[stat] = stats.delta;
    }
  }
}

}  // namespace selfattn::cuda::sm80
