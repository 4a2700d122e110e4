// Shapes and dtypes of the results of qk_norm_rope and of its gradient, for tracing. Every result is contiguous.
#include <ATen/ops/empty.h>

#include "rotary/norm_rope.h"

namespace selfattn {
namespace {

at::Tensor contiguous_like(const at::Tensor& tensor) { return at::empty_symint(tensor.sym_sizes(), tensor.options()); }

NormRopeHeads qk_norm_rope_meta(const NormRopeCall& call) { return {contiguous_like(call.q), contiguous_like(call.k)}; }

NormRopeGradients qk_norm_rope_backward_meta(const NormRopeCall& call, const at::Tensor& grad_q,
                                             const at::Tensor& grad_k) {
  const auto of_weight = [](const OptionalTensor& weight, const at::Tensor& grad) {
    return weight ? contiguous_like(*weight) : at::empty({0}, grad.options());
  };
  return {contiguous_like(grad_q), contiguous_like(grad_k), of_weight(call.q_weight, grad_q),
          of_weight(call.k_weight, grad_k)};
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, Meta, m) {
  using namespace selfattn;
  register_norm_rope<qk_norm_rope_meta, qk_norm_rope_backward_meta, copy_norm_rope_backward>(m);
}
