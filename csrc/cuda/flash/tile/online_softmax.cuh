// Softmax over key blocks as they come, for the two rows (r = 0, 1) that a lane shares with its three neighbours.
//
// A block of scores becomes P = exp2(score * c - max * c) with c = scale * log2(e). The steps are separate so that the
// kernel can put its waits between them. Row sums stay per lane until the end of the tile.
//
// max * c is rounded to a float, so the largest P is 2^d with |d| up to half an ulp of max * c. Where that product is
// large, d is felt in P (and overflows in the end). Rows with |max * c| >= kExactFrom are therefore computed once more
// (repair.cuh), with their maximum taken off their scores first, which is exact for the scores that count.
#pragma once
#include "constants.h"
#include "ptx/arithmetic.cuh"

namespace selfattn::cuda {

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// Below, half an ulp of max * c is at most 2^-14, far less than the rounding of P to 16 bits.
constexpr float kExactFrom = 1024.f;

struct SoftmaxState {
  float max[2];  // of the scores seen, unscaled
  float sum[2];  // of P, this lane's columns
};

template <int kTileKey>
struct OnlineSoftmax {
  float c;              // scale * log2(e)
  SoftmaxState state;   // up to the block in work
  float correction[2];  // what earlier P, sums and outputs must be multiplied by

  // Takes the block's row maxima in. A row with nothing allowed so far keeps max = -inf and gets P = 0.
  template <bool kIsFirst, bool kIsExact>
  __device__ __forceinline__ void take_max(float (&s)[kTileKey / 2]) {
    float partial[8], base[2];
    take_lane_max(s, partial);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float top = max_of_row(partial, r);
      if (!kIsFirst) top = fmaxf(top, state.max[r]);
      base[r] = top == -infinity() ? 0.f : top;
      correction[r] = kIsFirst ? 1.f : ptx::exp2_approx((state.max[r] - base[r]) * c);
      state.max[r] = top;
      offset_[r] = base[r] * c;
      block_sum_[2 * r] = block_sum_[2 * r + 1] = 0.f;
    }
    if (kIsExact) take_base_off(s, base);
  }

  // Scores become P in groups of 8 columns kFrom .. kTo - 1.
  template <int kFrom, int kTo>
  __device__ __forceinline__ void exponentiate(float (&s)[kTileKey / 2]) {
#pragma unroll
    for (int group = kFrom; group < kTo; group++)
#pragma unroll
      for (int r = 0; r < 2; r++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float& p = s[4 * group + 2 * r + i];
          p = ptx::exp2_approx(p * c - offset_[r]);
          block_sum_[2 * r + i] += p;
        }
  }

  template <bool kIsFirst>
  __device__ __forceinline__ void take_sum() {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float block = block_sum_[2 * r] + block_sum_[2 * r + 1];
      state.sum[r] = kIsFirst ? block : state.sum[r] * correction[r] + block;
    }
  }

  // Brings the accumulated output to the new maximum; skipped by a warp none of whose rows has one.
  template <int kCount>
  __device__ __forceinline__ void rescale(float (&o)[kCount]) const {
    if (__all_sync(~0u, correction[0] == 1.f && correction[1] == 1.f)) return;
#pragma unroll
    for (int i = 0; i < kCount; i++) o[i] *= correction[i / 2 % 2];
  }

  // Whether the row's sum is the best that can be had without taking its maximum off.
  __device__ __forceinline__ bool is_good_enough(int r) const { return fabsf(offset_[r]) < kExactFrom; }

  // What the largest logit of a row is `scale` times of.
  __device__ __forceinline__ float max_score(int r) const { return state.max[r]; }

 protected:
  static __device__ __forceinline__ void take_lane_max(const float (&s)[kTileKey / 2], float (&partial)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) partial[i] = s[i];  // independent chains
#pragma unroll
    for (int i = 8; i < kTileKey / 2; i++) partial[i % 8] = fmaxf(partial[i % 8], s[i]);
  }
  static __device__ __forceinline__ float max_of_row(const float (&partial)[8], int r) {
    float top = fmaxf(fmaxf(partial[2 * r], partial[2 * r + 1]), fmaxf(partial[2 * r + 4], partial[2 * r + 5]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    return fmaxf(top, __shfl_xor_sync(~0u, top, 2));
  }

  float offset_[2], block_sum_[4];

 private:
  // Row by row: the others keep the bits that they have without this.
  __device__ __forceinline__ void take_base_off(float (&s)[kTileKey / 2], const float (&base)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if (fabsf(offset_[r]) < kExactFrom) continue;
      offset_[r] = 0.f;
#pragma unroll
      for (int i = 0; i < kTileKey / 4; i++) s[i / 2 * 4 + 2 * r + i % 2] -= base[r];
    }
  }
};

// The end of a row: what its output is multiplied by, and its logsumexp. `sink` is one more logit in the denominator.
struct RowEnd {
  float factor, lse;
};

// A row with no allowed key (sum 0) ends as output 0 and lse -inf; with a sink, lse is the sink. Where one logit has
// all the weight, lse is that logit as the backward pass rounds it, max * scale: its P is then exactly 1.
__device__ __forceinline__ RowEnd finish_row(float max, float sum, float scale) {
  if (sum == 0.f) return {0.f, -infinity()};
  return {__fdividef(1.f, sum), fmaf(max, scale, __logf(sum))};
}

__device__ __forceinline__ RowEnd finish_row_with_sink(float max, float sum, float scale, float sink) {
  if (sink == infinity() && sum == sum) return {0.f, infinity()};  // takes all the weight
  const float top = fmaxf(max * scale, sink);
  if (top == -infinity() && sum == sum) return {0.f, -infinity()};
  const float weight = __expf(max * scale - top), total = sum * weight + __expf(sink - top);
  return {__fdividef(weight, total), top + __logf(total)};
}

}  // namespace selfattn::cuda
