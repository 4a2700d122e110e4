// Softmax over key blocks as they come, for the two rows (r = 0, 1) of a group that a lane shares with its three
// neighbours: P = exp2((score - max) * c) with c = scale * log2(e). The difference is exact for the scores that count,
// however large they are.
#pragma once
#include "flash/tile/online_softmax.cuh"

namespace selfattn::cuda::float32 {

struct RowSoftmax {
  float max[2] = {-infinity(), -infinity()};  // of the scores seen, unscaled
  float sum[2] = {0.f, 0.f};                  // of P, this lane's columns

  // Scores become P. Returns in `correction` what earlier P, sums and outputs must be multiplied by. A row with nothing
  // allowed so far keeps max = -inf and gets P = 0.
  template <int kCount>
  __device__ __forceinline__ void take(float (&s)[kCount], float c, float (&correction)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float top = max[r];
#pragma unroll
      for (int i = 0; i < kCount / 2; i++) top = fmaxf(top, s[i / 2 * 4 + 2 * r + i % 2]);
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float base = top == -infinity() ? 0.f : top;
      correction[r] = ptx::exp2_approx((max[r] - base) * c);
      max[r] = top;
      float block_sum[2] = {0.f, 0.f};
#pragma unroll
      for (int i = 0; i < kCount / 2; i++) {
        float& p = s[i / 2 * 4 + 2 * r + i % 2];
        p = ptx::exp2_approx((p - base) * c);
        block_sum[i % 2] += p;
      }
      sum[r] = fmaf(sum[r], correction[r], block_sum[0] + block_sum[1]);
    }
  }

  // Over all columns of the row.
  __device__ __forceinline__ float total(int r) const {
    float all = sum[r] + __shfl_xor_sync(~0u, sum[r], 1);
    return all + __shfl_xor_sync(~0u, all, 2);
  }
};

// The end of a row, as finish_row and finish_row_with_sink are for 16 bits.
__device__ __forceinline__ RowEnd end_row(float max, float sum, float scale) {
  if (sum == 0.f) return {0.f, -infinity()};
  return {1.f / sum, fmaf(max, scale, logf(sum))};
}

__device__ __forceinline__ RowEnd end_row_with_sink(float max, float sum, float scale, float sink) {
  if (sink == infinity() && sum == sum) return {0.f, infinity()};  // takes all the weight
  const float top = fmaxf(max * scale, sink);
  if (top == -infinity() && sum == sum) return {0.f, -infinity()};
  const float weight = expf(fmaf(max, scale, -top)), total = fmaf(sum, weight, expf(sink - top));
  return {weight / total, top + logf(total)};
}

}  // namespace selfattn::cuda::float32
