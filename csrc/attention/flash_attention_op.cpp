#include "attention/flash_attention_op.h"

#include <ATen/ops/empty.h>
#include <c10/util/StringUtil.h>
#include <torch/library.h>

#include "attention/select_backend.h"

namespace selfattn {

InputGradients flash_attention_backward(const AttentionProblem& problem, const AttentionGradients& gradients,
                                        const GradientMemory& memory) {
  const bool has_memory = memory.query || memory.key || memory.value;
  if (!has_memory || !problem.query.is_cuda()) return flash_attention_backward(problem, gradients);
  const auto take = [](const OptionalTensor& memory, const at::Tensor& like) {
    return memory ? *memory : at::empty(like.sizes(), like.options());
  };
  at::Tensor dq = take(memory.query, problem.query), dk = take(memory.key, problem.key),
             dv = take(memory.value, problem.value);
  FlashAttentionBackwardInto::call(problem, gradients, dq, dk, dv);
  return {dq, dk, dv};
}

void copy_attention_backward(const AttentionProblem& problem, const AttentionGradients& gradients, const at::Tensor& dq,
                             const at::Tensor& dk, const at::Tensor& dv) {
  const auto [grad_query, grad_key, grad_value] = flash_attention_backward(problem, gradients);
  dq.copy_(grad_query), dk.copy_(grad_key), dv.copy_(grad_value);
}

void check_kernel_call(const AttentionProblem& problem) {
  const auto reasons = reasons_against(flash_backend(), problem);
  TORCH_CHECK_NOT_IMPLEMENTED(reasons.empty(),
                              "selfattn: flash_attention cannot serve this call: ", c10::Join("; ", reasons));
}

void check_kernel_call(const AttentionProblem& problem, const AttentionGradients& gradients) {
  check_kernel_call(problem);
  check_gradients(problem, gradients);
}

void check_kernel_call(const AttentionProblem& problem, const AttentionGradients& gradients, const at::Tensor& dq,
                       const at::Tensor& dk, const at::Tensor& dv) {
  check_kernel_call(problem, gradients);
  check_gradient_memory(problem, gradients, dq, dk, dv);
}

}  // namespace selfattn

// Any device without a kernel of its own.
TORCH_LIBRARY_IMPL(selfattn, CompositeExplicitAutograd, m) {
  using namespace selfattn;
  m.impl("flash_attention_backward.into",
         TORCH_FN(FlashAttentionBackwardInto::from_schema<checked<copy_attention_backward>>));
}
