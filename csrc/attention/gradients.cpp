// What every kernel of the attention's gradient requires of its arguments, on any device.
#include "attention/gradients.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include "common/dense_tensor.h"

namespace selfattn {
namespace {

/// A tensor with the name of its argument, for messages.
struct Named {
  const char* name;
  const at::Tensor& tensor;
};

void check(const Named& argument, at::ScalarType dtype, c10::SymIntArrayRef sizes, const at::Tensor& query) {
  const auto& [name, tensor] = argument;
  check_dense(tensor, name);
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype && tensor.device() == query.device(), "selfattn: ", name, " must be ",
                   dtype, " on ", query.device(), "; got ", tensor.scalar_type(), " on ", tensor.device());
  TORCH_CHECK_VALUE(tensor.sym_sizes() == sizes, "selfattn: ", name, " must have the shape ", sizes, "; got ",
                    tensor.sym_sizes());
}

void check_result(const Named& result, const at::Tensor& like) {
  check(result, like.scalar_type(), like.sym_sizes(), like);
  TORCH_CHECK_VALUE(result.tensor.is_contiguous(), "selfattn: ", result.name, " must be contiguous; got strides ",
                    result.tensor.sym_strides());
}

void check_overlap(const Named& result, const Named& other, bool may_be_same) {
  const auto status = at::get_overlap_status(result.tensor, other.tensor);
  const bool is_refused =
      status == at::MemOverlapStatus::Partial || (status == at::MemOverlapStatus::Full && !may_be_same);
  TORCH_CHECK_VALUE(!is_refused, "selfattn: ", result.name, " must not share memory with ", other.name,
                    may_be_same ? " but be all of it" : "", "; got tensors that overlap");
}

}  // namespace

AttentionResults empty_results(const AttentionProblem& problem) {
  const auto options = problem.query.options();
  return {
      at::empty_symint({problem.batch(), problem.query_length(), problem.query_heads(), problem.value_head_dim()},
                       options),
      at::empty_symint({problem.batch(), problem.query_heads(), problem.query_length()}, options.dtype(at::kFloat))};
}

InputGradients empty_gradients(const AttentionProblem& problem) {
  const auto empty_like = [](const at::Tensor& tensor) {
    return at::empty_symint(tensor.sym_sizes(), tensor.options());
  };
  return {empty_like(problem.query), empty_like(problem.key), empty_like(problem.value)};
}

void check_gradients(const AttentionProblem& problem, const AttentionGradients& gradients) {
  const at::Tensor& query = problem.query;
  const c10::SymInt out_sizes[] = {problem.batch(), problem.query_length(), problem.query_heads(),
                                   problem.value_head_dim()},
                    row_sizes[] = {problem.batch(), problem.query_heads(), problem.query_length()};
  check({"grad_out", gradients.grad_out}, query.scalar_type(), out_sizes, query);
  check({"out", gradients.out}, query.scalar_type(), out_sizes, query);
  check({"lse", gradients.lse}, at::kFloat, row_sizes, query);
  if (gradients.grad_lse) check({"grad_lse", *gradients.grad_lse}, at::kFloat, row_sizes, query);
}

void check_gradient_memory(const AttentionProblem& problem, const AttentionGradients& gradients, const at::Tensor& dq,
                           const at::Tensor& dk, const at::Tensor& dv) {
  const Named query{"q", problem.query}, key{"k", problem.key}, value{"v", problem.value}, out{"out", gradients.out};
  const Named results[] = {{"dq", dq}, {"dk", dk}, {"dv", dv}};
  check_result(results[0], problem.query);
  check_result(results[1], problem.key);
  check_result(results[2], problem.value);
  if (dq.is_meta() || dq.unsafeGetTensorImpl()->is_python_dispatch()) return;  // without memory
  const at::Tensor& grad_lse = gradients.grad_lse ? *gradients.grad_lse : gradients.lse;
  const Named inputs[] = {
      query, key, value, out, {"grad_out", gradients.grad_out}, {"lse", gradients.lse}, {"grad_lse", grad_lse}};
  const char* const reused[] = {out.name, key.name, value.name};
  for (size_t i = 0; i < std::size(results); ++i) {
    for (const Named& input : inputs) check_overlap(results[i], input, input.name == reused[i]);
    for (size_t j = 0; j < i; ++j) check_overlap(results[i], results[j], /*may_be_same=*/false);
  }
}

}  // namespace selfattn
