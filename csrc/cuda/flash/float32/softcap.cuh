// Softcap: logits become softcap * tanh(logits / softcap). Scores, which are logits without the scale, become that
// tanh, and softcap is their scale from then on.
#pragma once
#include "products.cuh"

namespace selfattn::cuda::float32 {

struct LogitScale {
  float of_scores;    // what the softmax multiplies scores by
  float before_tanh;  // 0: no softcap
};

__device__ __forceinline__ LogitScale make_logit_scale(float scale, float softcap) {
  return softcap > 0.f ? LogitScale{softcap, scale / softcap} : LogitScale{scale, 0.f};
}

template <int kGroups, int kCount>
__device__ __forceinline__ void cap_scores(float (&scores)[kGroups][kCount], const LogitScale& scale) {
  if (scale.before_tanh == 0.f) return;
#pragma unroll
  for (int g = 0; g < kGroups; g++)
#pragma unroll
    for (int i = 0; i < kCount; i++) scores[g][i] = tanhf(scores[g][i] * scale.before_tanh);
}

}  // namespace selfattn::cuda::float32
