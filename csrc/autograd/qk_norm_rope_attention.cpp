// Autograd of qk_norm_rope_attention: keeps the raw q, k and v, out and lse; its gradient makes the rest again.
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/buffer_donation.h"
#include "backend/reference.h"
#include "norm_rope_attention/call.h"

namespace selfattn {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// With a name that other files could see: it is what profilers and grad_fn show.
class QkNormRopeAttention : public torch::autograd::Function<QkNormRopeAttention> {
 public:
  /// The tensors that may want a gradient stand beside the call that holds them: that is where apply() looks.
  static variable_list forward(AutogradContext* context, const at::Tensor& q, const at::Tensor& /*k*/,
                               const at::Tensor& /*v*/, const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                               const OptionalTensor& /*sinks*/, const NormRopeAttentionCall& call) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, lse] = qk_norm_rope_attention(call);
    AttentionProblem problem = call.problem;
    problem.key_segment_ids.reset();  // those of the queries
    variable_list saved = problem.save(context->saved_data);
    saved.insert(saved.end(), {out, lse, as_saved(q_weight), as_saved(k_weight), as_saved(call.norm_rope.freqs_sin),
                               as_saved(call.norm_rope.freqs_cos)});
    context->save_for_backward(std::move(saved));
    context->saved_data["eps"] = call.norm_rope.eps;
    context->saved_data["theta"] = call.norm_rope.theta;
    context->saved_data["pairs_halves"] = call.norm_rope.pairing == RotaryPairing::kHalf;
    context->saved_data["are_donated"] = DonatedBuffers::include(q);
    context->set_materialize_grads(false);
    return {out, lse};
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    if (!grads[0].defined() && !grads[1].defined()) return variable_list(7);
    const auto saved = context->get_saved_variables();
    const at::TensorList others = at::TensorList(saved).slice(AttentionProblem::kSavedTensors);
    const auto& data = context->saved_data;
    const bool are_donated =
        data.at("are_donated").toBool() && !at::GradMode::is_enabled() && DonatedBuffers::may_be_written(grads);
    GradientMemory memory;
    if (are_donated) {
      memory = donated_memory(saved[0], saved[1], saved[2], others[0]);  // before the problem holds them too
      memory.key.reset();  // the norm's gradient reads the raw one; that of the rotated one is taken instead
    }
    AttentionProblem problem = AttentionProblem::restore(saved, data);
    problem.key_segment_ids = problem.query_segment_ids;
    NormRopeCall norm_rope{.q = problem.query,
                           .k = problem.key,
                           .q_weight = as_optional(others[2]),
                           .k_weight = as_optional(others[3]),
                           .freqs_sin = as_optional(others[4]),
                           .freqs_cos = as_optional(others[5]),
                           .eps = data.at("eps").toDouble(),
                           .theta = data.at("theta").toDouble()};
    if (data.at("pairs_halves").toBool()) norm_rope.pairing = RotaryPairing::kHalf;
    const AttentionGradients gradients{.grad_out = grads[0].defined() ? grads[0] : at::zeros_like(others[0]),
                                       .grad_lse = as_optional(grads[1]),
                                       .out = others[0],
                                       .lse = others[1]};
    // First: it reads out, whose memory may be taken.
    const at::Tensor grad_sinks = problem.sinks ? sinks_gradient(*problem.sinks, gradients) : at::Tensor();
    const auto run = [&](const NormRopeAttentionCall& call) {
      if (!are_donated) return qk_norm_rope_attention_backward(call, gradients);
      at::AutoDispatchBelowADInplaceOrView guard;
      return attend_backward_then_norm_rope_in_place(call, gradients, memory);
    };
    const auto [dq, dk, dv, dq_weight, dk_weight] = run({norm_rope, problem});
    return {dq,
            dk,
            dv,
            norm_rope.q_weight ? dq_weight : at::Tensor(),
            norm_rope.k_weight ? dk_weight : at::Tensor(),
            grad_sinks,
            at::Tensor()};
  }
};

namespace {

AttentionResults qk_norm_rope_attention_autograd(const NormRopeAttentionCall& call) {
  const NormRopeCall& norm_rope = call.norm_rope;
  // What one node cannot differentiate, its parts can, or say why they cannot.
  if (needs_composition(norm_rope)) return norm_rope_then_attend(call);
  if (!any_requires_grad({norm_rope.q_weight, norm_rope.k_weight}) && !call.problem.requires_grad()) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return qk_norm_rope_attention(call);
  }
  const auto results = QkNormRopeAttention::apply(norm_rope.q, norm_rope.k, call.problem.value, norm_rope.q_weight,
                                                  norm_rope.k_weight, call.problem.sinks, call);
  return {results[0], results[1]};
}

NormRopeAttentionGradients qk_norm_rope_attention_backward_autograd(const NormRopeAttentionCall& call,
                                                                    const AttentionGradients& gradients) {
  const NormRopeCall& norm_rope = call.norm_rope;
  if (needs_composition(norm_rope) || call.problem.requires_grad() ||
      any_requires_grad({norm_rope.q_weight, norm_rope.k_weight, gradients.grad_out, gradients.grad_lse, gradients.out,
                         gradients.lse})) {
    return attend_backward_then_norm_rope(call, gradients);  // whose gradients are differentiable
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return qk_norm_rope_attention_backward(call, gradients);
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, Autograd, m) {
  using namespace selfattn;
  m.impl("qk_norm_rope_attention", TORCH_FN(NormRopeAttention::from_schema<selfattn::qk_norm_rope_attention_autograd>));
  m.impl("qk_norm_rope_attention_backward",
         TORCH_FN(NormRopeAttentionBackward::from_schema<selfattn::qk_norm_rope_attention_backward_autograd>));
}
