// qk_norm_rope_attention: qk_norm_rope and flash_attention as one operator, for what it keeps for the gradient.
#include "norm_rope_attention/call.h"

#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "attention/select_backend.h"
#include "common/plain_tensor.h"

namespace selfattn {
namespace {

/// Under autocast multihead_attention casts what qk_norm_rope gives; the one operator has no place for that.
bool is_cast_between(const at::Tensor& heads) {
  return is_autocast_on(heads) && heads.scalar_type() != at::autocast::get_autocast_dtype(heads.device().type());
}

/// The attention's problem, of the rotated q and k.
AttentionProblem rotated(const NormRopeAttentionCall& call) {
  AttentionProblem problem = call.problem;
  std::tie(problem.query, problem.key) = qk_norm_rope(call.norm_rope);
  return problem;
}

}  // namespace

NormRopeAttentionCall make_norm_rope_attention_call(NormRopeCall norm_rope, const at::Tensor& v,
                                                    const AttentionArguments& arguments) {
  validate(norm_rope);
  AttentionProblem problem = make_attention_problem(norm_rope.q, norm_rope.k, v, arguments, /*needs_lse=*/true);
  return {std::move(norm_rope), std::move(problem)};
}

std::optional<NormRopeAttentionCall> as_one_operator(const NormRopeCall& norm_rope, const at::Tensor& v,
                                                     const AttentionArguments& arguments, c10::string_view backend) {
  const Backend name = parse_backend(backend);
  if (name != Backend::kAuto && name != Backend::kFlash) return std::nullopt;
  if (!norm_rope.norm || !norm_rope.rope || norm_rope.positions || is_cast_between(norm_rope.q)) return std::nullopt;
  if (!any_requires_grad({norm_rope.q, norm_rope.k, v, norm_rope.q_weight, norm_rope.k_weight, arguments.sinks}) ||
      needs_composition(norm_rope)) {
    return std::nullopt;
  }
  // The operator, or its parts in its place, checks the norm and the rotation; flash's constraints read the attention.
  NormRopeAttentionCall call{norm_rope,
                             make_attention_problem(norm_rope.q, norm_rope.k, v, arguments, /*needs_lse=*/true)};
  if (!reasons_against(flash_backend(), call.problem).empty()) return std::nullopt;
  return call;
}

AttentionResults norm_rope_then_attend(const NormRopeAttentionCall& call) { return flash_attention(rotated(call)); }

NormRopeAttentionGradients attend_backward_then_norm_rope(const NormRopeAttentionCall& call,
                                                          const AttentionGradients& gradients) {
  // The rotated q and k live no longer than needed.
  const auto [grad_q, grad_k, dv] = flash_attention_backward(rotated(call), gradients);
  const auto [dq, dk, dq_weight, dk_weight] = qk_norm_rope_backward(call.norm_rope, grad_q, grad_k);
  return {dq, dk, dv, dq_weight, dk_weight};
}

NormRopeAttentionGradients attend_backward_then_norm_rope_in_place(const NormRopeAttentionCall& call,
                                                                   const AttentionGradients& gradients,
                                                                   GradientMemory memory) {
  const auto attend_backward = [&] {  // the rotated q lives no longer than needed
    const AttentionProblem problem = rotated(call);
    memory.key = problem.key;
    return flash_attention_backward(problem, gradients, memory);
  };
  auto [dq, dk, dv] = attend_backward();
  memory = {};
  const auto [dq_weight, dk_weight] = NormRopeBackwardInPlace::call(call.norm_rope, dq, dk);
  return {dq, dk, dv, dq_weight, dk_weight};
}

namespace {

NormRopeAttentionGradients backward_below_autograd(const NormRopeAttentionCall& call,
                                                   const AttentionGradients& gradients) {
  return attend_backward_then_norm_rope_in_place(call, gradients, {});
}

}  // namespace
}  // namespace selfattn

// For every device: the parts have kernels.
TORCH_LIBRARY_IMPL(selfattn, CompositeExplicitAutograd, m) {
  using namespace selfattn;
  m.impl("qk_norm_rope_attention", TORCH_FN(NormRopeAttention::from_schema<selfattn::norm_rope_then_attend>));
  m.impl("qk_norm_rope_attention_backward",
         TORCH_FN(NormRopeAttentionBackward::from_schema<selfattn::backward_below_autograd>));
}
