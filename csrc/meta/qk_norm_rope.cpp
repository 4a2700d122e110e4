// Shapes and dtypes of the results of qk_norm_rope and of its gradient, for tracing. Every result is contiguous.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "rotary/norm_rope.h"

namespace selfattn {
namespace {

at::Tensor empty_like(const at::Tensor& tensor) { return at::empty_symint(tensor.sym_sizes(), tensor.options()); }

NormRopeHeads qk_norm_rope_meta(const NormRopeCall& call) { return {empty_like(call.q), empty_like(call.k)}; }

NormRopeGradients qk_norm_rope_backward_meta(const NormRopeCall& call, const at::Tensor& grad_q,
                                             const at::Tensor& grad_k) {
  const auto of_weight = [](const OptionalTensor& weight, const at::Tensor& grad) {
    return weight ? empty_like(*weight) : at::empty({0}, grad.options());
  };
  return {empty_like(grad_q), empty_like(grad_k), of_weight(call.q_weight, grad_q), of_weight(call.k_weight, grad_k)};
}

NormRopeWeightGradients qk_norm_rope_backward_in_place_meta(const NormRopeCall& call, at::Tensor& grad_q,
                                                            at::Tensor& grad_k) {
  const auto [dq, dk, dq_weight, dk_weight] = qk_norm_rope_backward_meta(call, grad_q, grad_k);
  return {dq_weight, dk_weight};
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, Meta, m) {
  m.impl("qk_norm_rope", TORCH_FN((selfattn::from_schema<selfattn::qk_norm_rope_meta>)));
  m.impl("qk_norm_rope_backward", TORCH_FN((selfattn::backward_from_schema<selfattn::qk_norm_rope_backward_meta>)));
  m.impl("qk_norm_rope_backward.in_place",
         TORCH_FN((selfattn::backward_in_place_from_schema<selfattn::qk_norm_rope_backward_in_place_meta>)));
}
