// Softcap: logits become softcap * tanh(logits / softcap). Scores, which are logits without the scale, become that
// tanh, and softcap is their scale from then on.
#pragma once
#include "products.cuh"

namespace selfattn::cuda::float32 {

struct LogitScale {
  float of_scores;  // what the softmax multiplies scores by
  bool has_softcap;
  float before_tanh;
};

__device__ __forceinline__ LogitScale make_logit_scale(float scale, float softcap) {
  constexpr float kLargest = 3.4028234e38f;  // a score of 0 times this is 0
  if (!(softcap > 0.f)) return {scale, false, 0.f};
  return {softcap, true, fminf(scale / softcap, kLargest)};
}

template <int kGroups, int kCount>
__device__ __forceinline__ void cap_scores(float (&scores)[kGroups][kCount], const LogitScale& scale) {
  if (!scale.has_softcap) return;
#pragma unroll
  for (int g = 0; g < kGroups; g++)
#pragma unroll
    for (int i = 0; i < kCount; i++) scores[g][i] = tanhf(scores[g][i] * scale.before_tanh);
}

}  // namespace selfattn::cuda::float32
