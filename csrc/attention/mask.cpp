#include "attention/mask.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/logical_and.h>

#include <utility>

#include "segment/segment_ids.h"

namespace selfattn {
namespace {

void intersect(std::optional<at::Tensor>& mask, const at::Tensor& rule) {
  mask = mask ? at::logical_and(*mask, rule) : rule;
}

/// What causality and windows compare, in int64, in which no difference overflows: of queries (1 or B, 1, Sq, 1) and of
/// keys (1 or B, 1, 1, Skv).
std::pair<at::Tensor, at::Tensor> compared_positions(const AttentionProblem& problem) {
  if (problem.has_positions()) {
    return {problem.query_positions->to(at::kLong).unsqueeze(1).unsqueeze(3),
            problem.key_positions->to(at::kLong).unsqueeze(1).unsqueeze(2)};
  }
  const auto indices = problem.query.options().dtype(at::kLong).requires_grad(false);
  const c10::SymInt shift = problem.key_length() - problem.query_length();  // aligns the last query with the last key
  const at::Tensor query = at::arange(problem.query_length(), indices) + at::Scalar(shift);
  const at::Tensor key = at::arange(problem.key_length(), indices);
  return {query.unsqueeze(0).unsqueeze(0).unsqueeze(3), key.unsqueeze(0).unsqueeze(0).unsqueeze(0)};
}

}  // namespace

std::optional<at::Tensor> attention_mask(const AttentionProblem& problem) {
  std::optional<at::Tensor> mask;
  if (problem.is_causal || problem.has_window()) {
    const auto [query, key] = compared_positions(problem);
    if (problem.is_causal) intersect(mask, key <= query);
    if (problem.window_left >= 0) intersect(mask, key >= query - at::Scalar(problem.window_left));
    if (problem.window_right >= 0) intersect(mask, key <= query + at::Scalar(problem.window_right));
  }
  if (problem.has_segments()) {
    const auto [query, key] = segment_ids_as_int32(*problem.query_segment_ids, *problem.key_segment_ids);
    intersect(mask, same_segment(query, key));
  }
  return mask;
}

}  // namespace selfattn
