#pragma once

#include <selfattn/ops.h>
#include <torch/torch.h>

/// Attention by loops over float64 elements: slow and obvious, what the operators are held to.
/// q (B, Sq, NH, D), k and v (B, Skv, NKV, D); ids (B, S), -1 padding, undefined: one document.
inline torch::Tensor loop_attention(torch::Tensor q, torch::Tensor k, torch::Tensor v, torch::Tensor ids, bool causal) {
  const auto B = q.size(0), Sq = q.size(1), NH = q.size(2), D = q.size(3), Skv = k.size(1), group = NH / k.size(2);
  q = q.to(torch::kDouble).contiguous(), k = k.to(torch::kDouble).contiguous(), v = v.to(torch::kDouble).contiguous();
  auto out = torch::zeros({B, Sq, NH, v.size(3)}, torch::kDouble);
  const auto qa = q.accessor<double, 4>(), ka = k.accessor<double, 4>(), va = v.accessor<double, 4>();
  auto oa = out.accessor<double, 4>();
  const auto id = [&](int64_t b, int64_t i) { return ids.defined() ? ids[b][i].item<int64_t>() : 0; };
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t h = 0; h < NH; ++h) {
      for (int64_t i = 0; i < Sq; ++i) {
        std::vector<double> weight(Skv, 0.0);
        double sum = 0.0;
        for (int64_t j = 0; j < Skv; ++j) {
          if ((causal && j > i + Skv - Sq) || id(b, i) < 0 || id(b, i) != id(b, j)) continue;
          double score = 0.0;
          for (int64_t d = 0; d < D; ++d) score += qa[b][i][h][d] * ka[b][j][h / group][d];
          sum += weight[j] = std::exp(score / std::sqrt(static_cast<double>(D)));
        }
        for (int64_t j = 0; j < Skv && sum > 0.0; ++j) {
          for (int64_t d = 0; d < v.size(3); ++d) oa[b][i][h][d] += weight[j] / sum * va[b][j][h / group][d];
        }
      }
    }
  }
  return out;
}

/// Ids in any order, with reuse and padding.
inline torch::Tensor random_ids(int64_t batch, int64_t length) {
  return torch::randint(-1, 3, {batch, length}, torch::kInt32);
}

/// The norm of the difference beside that of what is expected.
inline double relative_error(const torch::Tensor& actual, const torch::Tensor& expected) {
  const torch::Tensor reference = expected.to(torch::kDouble);
  return ((actual.to(torch::kDouble) - reference).norm() / reference.norm().clamp_min(1e-6)).item<double>();
}
