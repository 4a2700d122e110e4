// Autograd of flash_attention. Its gradient is the operator flash_attention_backward, so that a kernel sees it.
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "attention/flash_attention_op.h"
#include "autograd/buffer_donation.h"
#include "backend/reference.h"

namespace selfattn {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// With a name that other files could see: it is what profilers and grad_fn show.
class FlashAttention : public torch::autograd::Function<FlashAttention> {
 public:
  /// The tensors that may want a gradient stand beside the problem that holds them: that is where apply() looks.
  static variable_list forward(AutogradContext* context, const at::Tensor& query, const at::Tensor& /*key*/,
                               const at::Tensor& /*value*/, const OptionalTensor& /*sinks*/,
                               const AttentionProblem& problem) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, lse] = flash_attention(problem);
    variable_list saved = problem.save(context->saved_data);
    saved.insert(saved.end(), {out, lse});
    context->save_for_backward(std::move(saved));
    context->saved_data["are_donated"] = DonatedBuffers::include(query);
    context->set_materialize_grads(false);
    return {out, lse};
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    if (!grads[0].defined() && !grads[1].defined()) return variable_list(5);
    const at::Tensor &out = saved[AttentionProblem::kSavedTensors], &lse = saved[AttentionProblem::kSavedTensors + 1];
    GradientMemory memory;
    if (context->saved_data["are_donated"].toBool() && DonatedBuffers::may_be_written(grads)) {
      memory = donated_memory(saved[0], saved[1], saved[2], out);  // before the problem holds them too
    }
    const AttentionProblem problem = AttentionProblem::restore(saved, context->saved_data);
    const AttentionGradients gradients{.grad_out = grads[0].defined() ? grads[0] : at::zeros_like(out),
                                       .grad_lse = as_optional(grads[1]),
                                       .out = out,
                                       .lse = lse};
    at::Tensor grad_query, grad_key, grad_value, grad_sinks;
    // First: it reads out, whose memory may be taken.
    if (problem.sinks && context->needs_input_grad(3)) grad_sinks = sinks_gradient(*problem.sinks, gradients);
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
  m.impl("flash_attention_backward", TORCH_FN(FlashAttentionBackward::from_schema<attend_backward>));
}
