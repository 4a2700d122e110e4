#include "attention/mask.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/logical_and.h>

#include "segment/segment_ids.h"

namespace selfattn {
namespace {

void intersect(std::optional<at::Tensor>& mask, const at::Tensor& rule) {
  mask = mask ? at::logical_and(*mask, rule) : rule;
}

}  // namespace

std::optional<at::Tensor> attention_mask(const AttentionProblem& problem) {
  std::optional<at::Tensor> mask;
  if (problem.is_causal || problem.has_window()) {
    const auto indices = problem.query.options().dtype(at::kLong).requires_grad(false);
    const c10::SymInt shift = problem.key_length() - problem.query_length();  // aligns the last query with the last key
    const at::Tensor query = (at::arange(problem.query_length(), indices) + at::Scalar(shift)).unsqueeze(1);  // (Sq, 1)
    const at::Tensor key = at::arange(problem.key_length(), indices).unsqueeze(0);  // (1, Skv)
    if (problem.is_causal) intersect(mask, key <= query);
    if (problem.window_left >= 0) intersect(mask, key >= query - at::Scalar(problem.window_left));
    if (problem.window_right >= 0) intersect(mask, key <= query + at::Scalar(problem.window_right));
    mask = mask->unsqueeze(0).unsqueeze(0);
  }
  if (problem.has_segments()) {
    const auto [query, key] = segment_ids_as_int32(*problem.query_segment_ids, *problem.key_segment_ids);
    intersect(mask, same_segment(query, key));
  }
  return mask;
}

}  // namespace selfattn
