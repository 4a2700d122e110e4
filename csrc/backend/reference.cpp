// The formula in ATen operators: the oracle, and the backend that serves every option.
#include "backend/reference.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/log.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <limits>

#include "attention/mask.h"
#include "attention/masked_matmul.h"
#include "attention/select_backend.h"
#include "common/dense_tensor.h"
#include "kv_cache/attention_op.h"
#include "kv_cache/gather.h"

namespace selfattn {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// (B, S, N, D) -> (B, NKV, N / NKV, S, D): heads of a group beside each other, so that keys and values broadcast.
at::Tensor group_heads(const AttentionProblem& problem, const at::Tensor& tensor) {
  const auto sizes = tensor.sym_sizes();
  const c10::SymInt groups = problem.key_heads();
  return tensor.to(compute_dtype(problem.query))
      .view_symint({sizes[0], sizes[1], groups, sizes[2] / groups, sizes[3]})
      .permute({0, 2, 3, 1, 4});
}

/// (B, NH, Sq) -> (B, NKV, NH / NKV, Sq, 1).
at::Tensor group_rows(const AttentionProblem& problem, const at::Tensor& tensor) {
  const auto sizes = tensor.sym_sizes();
  const c10::SymInt groups = problem.key_heads();
  return tensor.reshape_symint({sizes[0], groups, sizes[1] / groups, sizes[2], 1});
}

/// (B, NKV, NH / NKV, S, D) -> (B, S, NH, D).
at::Tensor ungroup_heads(const at::Tensor& tensor) { return tensor.permute({0, 3, 1, 2, 4}).flatten(2, 3); }

/// A mask (1 or B, 1, Sq, Skv) as it broadcasts to the scores.
OptionalTensor group_pairs(const OptionalTensor& mask) {
  return mask ? OptionalTensor(mask->unsqueeze(2)) : std::nullopt;
}

/// Scaled and capped scores (B, NKV, NH / NKV, Sq, Skv); those of the other pairs mean nothing.
at::Tensor scores(const AttentionProblem& problem, const at::Tensor& query, const at::Tensor& key,
                  const OptionalTensor& allowed) {
  const at::Tensor scaled = masked_scores(query * problem.scale, key, allowed);
  return problem.softcap > 0.0 ? at::tanh(scaled / problem.softcap) * problem.softcap : scaled;
}

at::Tensor fill_other_pairs(const at::Tensor& tensor, const OptionalTensor& allowed, double number) {
  return allowed ? tensor.masked_fill(allowed->logical_not(), number) : tensor;
}

/// (NH,) -> (1, NKV, NH / NKV, 1, 1).
at::Tensor group_sinks(const AttentionProblem& problem, const at::Tensor& score) {
  const auto sizes = score.sym_sizes();
  return problem.sinks->to(score.scalar_type()).view_symint({1, sizes[1], sizes[2], 1, 1});
}

/// The logits of the sinks. An infinite one takes no part in the sums: -inf is no sink, whose gradient is 0, and what
/// +inf does is known without them.
at::Tensor finite_sinks(const at::Tensor& sinks) {
  return sinks.masked_fill(sinks == kInfinity, 0.0).masked_fill(sinks == -kInfinity, -kInfinity);  // stops the gradient
}

AttentionResults attend_gathered(const KvCacheProblem& problem) {
  const GatheredProblem gathered = gather(problem);
  return scatter_results(problem, reference_attention(gathered.attention, gathered.allowed));
}

}  // namespace

AttentionResults reference_attention(const AttentionProblem& problem) {
  return reference_attention(problem, attention_mask(problem));
}

AttentionResults reference_attention(const AttentionProblem& problem, const OptionalTensor& mask) {
  const at::Tensor value = group_heads(problem, problem.value);
  const OptionalTensor allowed = group_pairs(mask);
  const at::Tensor score =
      fill_other_pairs(scores(problem, group_heads(problem, problem.query), group_heads(problem, problem.key), allowed),
                       allowed, -kInfinity);

  at::Tensor row_max = problem.key_length() != 0 ? at::amax(score.detach(), -1, /*keepdim=*/true)
                                                 : score.detach().sum(-1, /*keepdim=*/true) - kInfinity;
  const at::Tensor sinks = problem.sinks ? group_sinks(problem, score) : at::Tensor();
  const at::Tensor sink_logits = problem.sinks ? finite_sinks(sinks) : at::Tensor();
  if (problem.sinks) row_max = at::maximum(row_max, sink_logits.detach());
  row_max = row_max.masked_fill(row_max == -kInfinity, 0.0);  // a row without an allowed pair: exp(-inf - 0) = 0

  const at::Tensor weights = at::exp(score - row_max);
  at::Tensor row_sum = weights.sum(-1, /*keepdim=*/true);
  // Added to the sum, and no column of the weights: their rows stay dense for the product with the values.
  if (problem.sinks) row_sum = row_sum + at::exp(sink_logits - row_max);
  const at::Tensor is_empty = row_sum == 0.0;
  const at::Tensor safe_sum = row_sum.masked_fill(is_empty, 1.0);

  const at::Tensor probability = weights / safe_sum;
  at::Tensor out = masked_product(probability, value, allowed).masked_fill(is_empty, 0.0);
  at::Tensor lse = (at::log(safe_sum) + row_max).masked_fill(is_empty, -kInfinity);
  if (problem.sinks) {  // one of +inf takes all the weight
    const at::Tensor takes_all = sinks == kInfinity;
    out = out.masked_fill(takes_all, 0.0);
    lse = at::where(takes_all, sinks, lse);
  }
  return {ungroup_heads(out).to(problem.query.scalar_type()), lse.squeeze(-1).flatten(1, 2).to(at::kFloat)};
}

InputGradients reference_attention_backward(const AttentionProblem& problem, const AttentionGradients& gradients) {
  const at::Tensor query = group_heads(problem, problem.query);
  const at::Tensor key = group_heads(problem, problem.key);
  const at::Tensor value = group_heads(problem, problem.value);
  const at::Tensor grad_out = group_heads(problem, gradients.grad_out);
  const OptionalTensor allowed = group_pairs(attention_mask(problem));
  const at::Tensor score = scores(problem, query, key, allowed);

  const at::Tensor lse = group_rows(problem, gradients.lse.to(score.scalar_type()));
  const at::Tensor is_empty = lse == -kInfinity;
  at::Tensor probability = at::exp(score - lse.masked_fill(is_empty, 0.0));
  probability = fill_other_pairs(probability.masked_fill(is_empty, 0.0), allowed, 0.0);

  at::Tensor row_term = -(grad_out * group_heads(problem, gradients.out)).sum(-1, /*keepdim=*/true);
  if (gradients.grad_lse) row_term = row_term + group_rows(problem, gradients.grad_lse->to(score.scalar_type()));
  at::Tensor grad_score = probability * (masked_scores(grad_out, value, allowed) + row_term);
  if (problem.softcap > 0.0) grad_score = grad_score * (1.0 - (score / problem.softcap).square());
  // Selected and not multiplied by a probability of 0: the row's term may be NaN.
  grad_score = fill_other_pairs(grad_score.masked_fill(is_empty, 0.0), allowed, 0.0) * problem.scale;

  const auto by_key = allowed ? OptionalTensor(allowed->transpose(-1, -2)) : std::nullopt;
  const at::Tensor grad_query = masked_product(grad_score, key, allowed);
  const at::Tensor grad_key = masked_product(grad_score.transpose(-1, -2), query, by_key).sum(2, /*keepdim=*/true);
  const at::Tensor grad_value =
      masked_product(probability.transpose(-1, -2), grad_out, by_key).sum(2, /*keepdim=*/true);
  const auto dtype = problem.query.scalar_type();
  return {ungroup_heads(grad_query).to(dtype), ungroup_heads(grad_key).to(dtype), ungroup_heads(grad_value).to(dtype)};
}

at::Tensor sinks_gradient(const at::Tensor& sinks, const AttentionGradients& gradients) {
  const at::Tensor& lse = gradients.lse;  // (B, NH, Sq), float32 or wider, as is everything here
  const at::Tensor sink = sinks.to(lse.scalar_type()).view({1, -1, 1});
  const at::Tensor zero = at::zeros({}, lse.options().requires_grad(false));
  // Of an infinite sink and an equal lse the difference is 0: a sink of +inf has all the weight, one of -inf none.
  const at::Tensor logit = at::where(at::logical_and(sink.isinf(), sink == lse), zero, sink - lse);
  const at::Tensor weight = at::where(sink == -kInfinity, zero, at::exp(logit));
  at::Tensor row_term = -(gradients.grad_out.to(lse.scalar_type()) * gradients.out).sum(-1);
  // A row without keys has an output of 0 that no gradient goes through, whatever bits the gradient has there. (Of
  // batched gradients, whose NaN nobody promises to keep apart, PyTorch has no rule for a selection.)
  if (!gradients.grad_out.key_set().has(c10::DispatchKey::Batched)) {
    row_term = at::where(gradients.out.any(-1), row_term, zero);
  }
  row_term = row_term.transpose(1, 2);
  if (gradients.grad_lse) row_term = row_term + *gradients.grad_lse;
  return (weight * row_term).sum(at::IntArrayRef{0, 2}).to(sinks.scalar_type());
}

const AttentionBackend& reference_backend() {
  static const AttentionBackend backend{Backend::kReference, /*constraints=*/{},
                                        [](const AttentionProblem& problem) { return reference_attention(problem); }};
  return backend;
}

const KvCacheBackend& reference_kv_cache_backend() {
  static const KvCacheBackend backend{Backend::kReference, /*constraints=*/{}, attend_gathered};
  return backend;
}

}  // namespace selfattn
