// Autograd of qk_norm_rope. Its gradient is the operator qk_norm_rope_backward, which recomputes all but the raw
// inputs.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "common/function_transform.h"
#include "rotary/norm_rope.h"

namespace selfattn {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// With a name that other files could see: it is what profilers and grad_fn show.
class QkNormRope : public torch::autograd::Function<QkNormRope> {
 public:
  static variable_list forward(AutogradContext* context, const at::Tensor& q, const at::Tensor& k,
                               const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                               const NormRopeCall& call) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [turned_q, turned_k] = qk_norm_rope(call);
    // A rotation's gradient does not depend on what was turned.
    context->save_for_backward({call.norm ? q : at::Tensor(), call.norm ? k : at::Tensor(), as_saved(q_weight),
                                as_saved(k_weight), as_saved(call.freqs_sin), as_saved(call.freqs_cos),
                                as_saved(call.positions)});
    context->saved_data["norm"] = call.norm;
    context->saved_data["eps"] = call.eps;
    context->saved_data["rope"] = call.rope;
    context->saved_data["theta"] = call.theta;
    context->saved_data["pairs_halves"] = call.pairing == RotaryPairing::kHalf;
    return {turned_q, turned_k};
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    NormRopeCall call{
        saved[0], saved[1], as_optional(saved[2]), as_optional(saved[3]), as_optional(saved[4]), as_optional(saved[5])};
    call.positions = as_optional(saved[6]);
    call.norm = context->saved_data["norm"].toBool();
    call.eps = context->saved_data["eps"].toDouble();
    call.rope = context->saved_data["rope"].toBool();
    call.theta = context->saved_data["theta"].toDouble();
    call.pairing = context->saved_data["pairs_halves"].toBool() ? RotaryPairing::kHalf : RotaryPairing::kInterleaved;
    const auto [dq, dk, dq_weight, dk_weight] = qk_norm_rope_backward(call, grads[0], grads[1]);
    return {dq, dk, call.q_weight ? dq_weight : at::Tensor(), call.k_weight ? dk_weight : at::Tensor(), at::Tensor()};
  }
};

namespace {

NormRopeHeads qk_norm_rope_autograd(const NormRopeCall& call) {
  if (needs_composition(call)) return compose_norm_rope(call);
  if (!any_requires_grad({call.q, call.k, call.q_weight, call.k_weight})) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return qk_norm_rope(call);
  }
  const auto results = QkNormRope::apply(call.q, call.k, call.q_weight, call.k_weight, call);
  return {results[0], results[1]};
}

/// Asked for a gradient of the gradient, it computes the formula in differentiable operators instead of the kernel.
NormRopeGradients qk_norm_rope_backward_autograd(const NormRopeCall& call, const at::Tensor& grad_q,
                                                 const at::Tensor& grad_k) {
  if (needs_composition(call) || has_tangent(grad_q) || has_tangent(grad_k) ||
      any_requires_grad({grad_q, grad_k, call.q, call.k, call.q_weight, call.k_weight})) {
    return compose_norm_rope_backward(call, grad_q, grad_k);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return qk_norm_rope_backward(call, grad_q, grad_k);
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, Autograd, m) {
  using namespace selfattn;
  m.impl("qk_norm_rope", TORCH_FN(NormRope::from_schema<selfattn::qk_norm_rope_autograd>));
  m.impl("qk_norm_rope_backward", TORCH_FN(NormRopeBackward::from_schema<selfattn::qk_norm_rope_backward_autograd>));
}
