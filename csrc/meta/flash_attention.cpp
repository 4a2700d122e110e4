// Shapes and dtypes of the kernel operators' results, for tracing. Every result is contiguous.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "attention/flash_attention_op.h"

namespace selfattn {
namespace {

AttentionResults attend(const AttentionProblem& problem) {
  const auto options = problem.query.options();
  return {
      at::empty_symint({problem.batch(), problem.query_length(), problem.query_heads(), problem.value_head_dim()},
                       options),
      at::empty_symint({problem.batch(), problem.query_heads(), problem.query_length()}, options.dtype(at::kFloat))};
}

InputGradients attend_backward(const AttentionProblem& problem, const AttentionGradients&) {
  const auto empty_like = [](const at::Tensor& tensor) {
    return at::empty_symint(tensor.sym_sizes(), tensor.options());
  };
  return {empty_like(problem.query), empty_like(problem.key), empty_like(problem.value)};
}

void attend_backward_into(const AttentionProblem&, const AttentionGradients&, const at::Tensor&, const at::Tensor&,
                          const at::Tensor&) {}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, Meta, m) {
  using namespace selfattn;
  m.impl("flash_attention", TORCH_FN(flash_attention_from_schema<checked<attend>>));
  m.impl("flash_attention_backward", TORCH_FN(FlashAttentionBackward::from_schema<checked<attend_backward>>));
  m.impl("flash_attention_backward.into",
         TORCH_FN(FlashAttentionBackwardInto::from_schema<checked<attend_backward_into>>));
}
