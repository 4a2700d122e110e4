// Compiled once for each instruction set: see cmake/cpu_kernels.cmake.
#include "cpu/qk_norm_rope_kernels.h"

#include <vector>

#include "cpu/kernels/rotation.h"
#include "cpu/kernels/vector_math.h"

namespace selfattn::cpu {
inline namespace CPU_CAPABILITY {

/// y = x with its first pairs rotated by the angles, or rotated back.
template <bool kBack>
void rotate(const NormRopeProblem& p, const TokenRotations& rotations, const float* __restrict x, float* __restrict y) {
  constexpr float kSign = kBack ? -1.0f : 1.0f;
  const float* const __restrict sin = rotations.sin, * const __restrict cos = rotations.cos;
  const int64_t half = p.rotary_dim / 2;
  for (int64_t i = p.rotary_dim; i < p.dim; ++i) y[i] = x[i];
  if (p.pairs_halves) {
    for (int64_t i = 0; i < half; ++i) {
      const float first = x[i], second = x[half + i], s = kSign * sin[i];
      y[i] = first * cos[i] - second * s;
      y[half + i] = first * s + second * cos[i];
    }
    return;
  }
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[2 * i], second = x[2 * i + 1], s = kSign * sin[i];
    y[2 * i] = first * cos[i] - second * s;
    y[2 * i + 1] = first * s + second * cos[i];
  }
}

/// x *= factor, and *= weight where there is one.
inline void scale(float* __restrict x, float factor, const float* __restrict weight, int64_t count) {
  if (!weight) {
    for (int64_t i = 0; i < count; ++i) x[i] *= factor;
    return;
  }
  for (int64_t i = 0; i < count; ++i) x[i] *= factor * weight[i];
}

/// The norm's gradient: g, that of its result, becomes that of x, where rstd is 1 / rms of x. Adds to the weight's
/// gradient where there is a weight.
inline void norm_backward(float* __restrict g, float* __restrict x, float rstd, const float* __restrict weight,
                          float* __restrict weight_gradient, int64_t count) {
  if (weight) {
    for (int64_t i = 0; i < count; ++i) {
      x[i] *= rstd;
      weight_gradient[i] += g[i] * x[i];
      g[i] *= weight[i];
    }
  } else {
    for (int64_t i = 0; i < count; ++i) x[i] *= rstd;
  }
  const float along = rstd * dot(g, x, count) / static_cast<float>(count);
  for (int64_t i = 0; i < count; ++i) g[i] = rstd * g[i] - x[i] * along;
}

inline float reciprocal_rms(const NormRopeProblem& p, const float* x) {
  return 1.0f / std::sqrt(dot(x, x, p.dim) / static_cast<float>(p.dim) + p.eps);
}

/// body(batch, token, head, row) for the heads of a range of tokens, `row` counting (B, S, N).
template <typename Body>
void for_each_head(const NormRopeProblem& p, int64_t first_token, int64_t last_token, TokenRotations& rotations,
                   const Body& body) {
  for (int64_t index = first_token; index < last_token; ++index) {
    const int64_t batch = index / p.length, token = index % p.length;
    rotations.go_to(batch, token);
    for (int64_t head = 0; head < p.heads; ++head) body(batch, token, head, index * p.heads + head);
  }
}

template <typename T>
void norm_rope_forward(const NormRopeProblem& p, int64_t first_token, int64_t last_token) {
  std::vector<float> workspace(3 * p.dim);
  float *x = workspace.data(), *y = x + p.dim;
  TokenRotations rotations{p, y + p.dim};
  T* const result = static_cast<T*>(p.result);
  for_each_head(p, first_token, last_token, rotations, [&](int64_t batch, int64_t token, int64_t head, int64_t row) {
    convert(p.input.at<const T>(batch, token, head), x, p.dim);
    if (p.has_norm) scale(x, reciprocal_rms(p, x), p.weight, p.dim);
    if (p.has_rope) rotate</*kBack=*/false>(p, rotations, x, y);
    convert_scaled(p.has_rope ? y : x, 1.0f, result + row * p.dim, p.dim);
  });
}

template <typename T>
void norm_rope_backward(const NormRopeProblem& p, int64_t first_token, int64_t last_token, float* weight_gradient) {
  std::vector<float> workspace(4 * p.dim);
  float *const x = workspace.data(), *const grad = x + p.dim, *const rotated_back = grad + p.dim;
  TokenRotations rotations{p, rotated_back + p.dim};
  T* const result = static_cast<T*>(p.result);
  for_each_head(p, first_token, last_token, rotations, [&](int64_t batch, int64_t token, int64_t head, int64_t row) {
    convert(p.grad.at<const T>(batch, token, head), grad, p.dim);
    if (p.has_rope) rotate</*kBack=*/true>(p, rotations, grad, rotated_back);
    float* const g = p.has_rope ? rotated_back : grad;
    if (p.has_norm) {
      convert(p.input.at<const T>(batch, token, head), x, p.dim);
      norm_backward(g, x, reciprocal_rms(p, x), p.weight, weight_gradient, p.dim);
    }
    convert_scaled(g, 1.0f, result + row * p.dim, p.dim);
  });
}

extern const ByDtype<NormRopeKernels> kNormRopeKernels;
const ByDtype<NormRopeKernels> kNormRopeKernels{{norm_rope_forward<float>, norm_rope_backward<float>},
                                                {norm_rope_forward<c10::BFloat16>, norm_rope_backward<c10::BFloat16>},
                                                {norm_rope_forward<c10::Half>, norm_rope_backward<c10::Half>}};

}  // namespace CPU_CAPABILITY
}  // namespace selfattn::cpu
