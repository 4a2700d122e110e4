// Autograd of flash_attention. Its gradient is the operator flash_attention_backward, so that a kernel sees it.
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "attention/flash_attention_op.h"
#include "attention/owned_heads.h"
#include "backend/reference.h"

namespace selfattn {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// With a name that other files could see: it is what profilers and grad_fn show.
class FlashAttention : public torch::autograd::Function<FlashAttention> {
 public:
  static variable_list forward(AutogradContext* context, const at::Tensor& query, const at::Tensor& key,
                               const at::Tensor& value, const OptionalTensor& sinks, const AttentionProblem& problem) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, lse] = flash_attention(problem);
    context->save_for_backward({query, key, value, as_saved(sinks), as_saved(problem.query_segment_ids),
                                as_saved(problem.key_segment_ids), out, lse});
    context->saved_data["is_causal"] = problem.is_causal;
    context->saved_data["scale"] = problem.scale;
    context->saved_data["window_left"] = problem.window_left;
    context->saved_data["window_right"] = problem.window_right;
    context->saved_data["softcap"] = problem.softcap;
    context->saved_data["owns_heads"] = OwnedHeads::are(query);
    context->set_materialize_grads(false);
    return {out, lse};
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    if (!grads[0].defined() && !grads[1].defined()) return variable_list(5);
    GradientMemory memory;
    if (context->saved_data["owns_heads"].toBool() && OwnedHeads::are_free(grads)) {
      memory = memory_of_heads(saved[0], saved[1], saved[2], saved[6]);
    }
    AttentionProblem problem{.query = saved[0], .key = saved[1], .value = saved[2]};
    problem.query_segment_ids = as_optional(saved[4]);
    problem.key_segment_ids = as_optional(saved[5]);
    problem.is_causal = context->saved_data["is_causal"].toBool();
    problem.scale = context->saved_data["scale"].toDouble();
    problem.window_left = context->saved_data["window_left"].toInt();
    problem.window_right = context->saved_data["window_right"].toInt();
    problem.softcap = context->saved_data["softcap"].toDouble();
    const AttentionGradients gradients{.grad_out = grads[0].defined() ? grads[0] : at::zeros_like(saved[6]),
                                       .grad_lse = as_optional(grads[1]),
                                       .out = saved[6],
                                       .lse = saved[7]};
    at::Tensor grad_query, grad_key, grad_value, grad_sinks;
    // First: it reads out, whose memory may be taken.
    if (saved[3].defined() && context->needs_input_grad(3)) grad_sinks = sinks_gradient(saved[3], gradients);
    if (context->needs_input_grad(0) || context->needs_input_grad(1) || context->needs_input_grad(2)) {
      std::tie(grad_query, grad_key, grad_value) = flash_attention_backward(problem, gradients, memory);
    }
    return {grad_query, grad_key, grad_value, grad_sinks, at::Tensor()};
  }
};

namespace {

AttentionResults attend(const AttentionProblem& problem) {
  if (!problem.requires_grad()) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return flash_attention(problem);
  }
  const auto results = FlashAttention::apply(problem.query, problem.key, problem.value, problem.sinks, problem);
  return {results[0], results[1]};
}

/// Asked for a gradient of the gradient, it computes the formula in differentiable operators instead of the kernel.
InputGradients attend_backward(const AttentionProblem& problem, const AttentionGradients& gradients) {
  check_gradients(problem, gradients);
  if (any_requires_grad({problem.query, problem.key, problem.value, gradients.grad_out, gradients.grad_lse,
                         gradients.out, gradients.lse})) {
    return reference_attention_backward(problem, gradients);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return flash_attention_backward(problem, gradients);
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, Autograd, m) {
  using namespace selfattn;
  m.impl("flash_attention", TORCH_FN(flash_attention_from_schema<attend>));
  m.impl("flash_attention_backward", TORCH_FN(flash_attention_backward_from_schema<attend_backward>));
}
