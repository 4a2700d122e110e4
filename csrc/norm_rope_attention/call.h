#pragma once

#include <tuple>

#include "attention/flash_attention_op.h"
#include "rotary/norm_rope.h"

namespace selfattn {

/// One call of qk_norm_rope_attention, validated: qk_norm_rope with norm and rotation, then flash_attention. As one
/// operator it keeps the raw q and k for its gradient, where two keep the normalised ones beside them.
struct NormRopeAttentionCall {
  NormRopeCall norm_rope;
  AttentionProblem problem;  // of the raw q and k
};

/// dq, dk, dv, dq_weight, dk_weight
using NormRopeAttentionGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

NormRopeAttentionCall make_norm_rope_attention_call(NormRopeCall norm_rope, const at::Tensor& v,
                                                    const AttentionArguments& arguments);

/// The call of that one operator where it serves: a gradient is wanted, there is a norm, and `backend` stands for
/// flash.
std::optional<NormRopeAttentionCall> as_one_operator(const NormRopeCall& norm_rope, const at::Tensor& v,
                                                     const AttentionArguments& arguments, c10::string_view backend);

/// The parts one after the other, each through the dispatcher; differentiable where they are.
AttentionResults norm_rope_then_attend(const NormRopeAttentionCall& call);
NormRopeAttentionGradients attend_backward_then_norm_rope(const NormRopeAttentionCall& call,
                                                          const AttentionGradients& gradients);

/// The same below autograd: gradients of the rotated q and k become those of the raw ones in place, and the memory of
/// the rotated k, which this makes again, and `memory` are written over.
NormRopeAttentionGradients attend_backward_then_norm_rope_in_place(const NormRopeAttentionCall& call,
                                                                   const AttentionGradients& gradients,
                                                                   GradientMemory memory);

// The only place in C++ where the operators' arguments are listed.

/// An implementation with the arguments of the schema.
template <AttentionResults (*kImplementation)(const NormRopeAttentionCall&)>
AttentionResults attention_from_schema(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                       const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                                       const OptionalTensor& freqs_sin, const OptionalTensor& freqs_cos,
                                       const OptionalTensor& segment_ids, double eps, double theta,
                                       c10::string_view pairing, bool causal, std::optional<double> qk_scale,
                                       int64_t window_left, int64_t window_right, double softcap,
                                       const OptionalTensor& sinks) {
  return kImplementation(make_norm_rope_attention_call(
      {q, k, q_weight, k_weight, freqs_sin, freqs_cos, /*norm=*/true, eps, /*rope=*/true, /*positions=*/std::nullopt,
       theta, parse_pairing(pairing, "pairing")},
      v, {segment_ids, causal, qk_scale, std::nullopt, window_left, window_right, softcap, sinks}));
}

/// The same for the gradient.
template <NormRopeAttentionGradients (*kImplementation)(const NormRopeAttentionCall&, const AttentionGradients&)>
NormRopeAttentionGradients attention_backward_from_schema(
    const at::Tensor& grad_out, const OptionalTensor& grad_lse, const at::Tensor& q, const at::Tensor& k,
    const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse, const OptionalTensor& q_weight,
    const OptionalTensor& k_weight, const OptionalTensor& freqs_sin, const OptionalTensor& freqs_cos,
    const OptionalTensor& segment_ids, double eps, double theta, c10::string_view pairing, bool causal,
    std::optional<double> qk_scale, int64_t window_left, int64_t window_right, double softcap) {
  const NormRopeAttentionCall call = make_norm_rope_attention_call(
      {q, k, q_weight, k_weight, freqs_sin, freqs_cos, /*norm=*/true, eps, /*rope=*/true, /*positions=*/std::nullopt,
       theta, parse_pairing(pairing, "pairing")},
      v, {segment_ids, causal, qk_scale, std::nullopt, window_left, window_right, softcap, std::nullopt});
  const AttentionGradients gradients{grad_out, grad_lse, out, lse};
  check_gradients(call.problem, gradients);
  return kImplementation(call, gradients);
}

// The operators through the dispatcher.

inline AttentionResults qk_norm_rope_attention(const NormRopeAttentionCall& call) {
  static const auto op = find_op<decltype(attention_from_schema<nullptr>)>("selfattn::qk_norm_rope_attention");
  const NormRopeCall& norm_rope = call.norm_rope;
  const AttentionProblem& problem = call.problem;
  return op.call(norm_rope.q, norm_rope.k, problem.value, norm_rope.q_weight, norm_rope.k_weight, norm_rope.freqs_sin,
                 norm_rope.freqs_cos, problem.query_segment_ids, norm_rope.eps, norm_rope.theta,
                 to_string(norm_rope.pairing), problem.is_causal, problem.scale, problem.window_left,
                 problem.window_right, problem.softcap, problem.sinks);
}

inline NormRopeAttentionGradients qk_norm_rope_attention_backward(const NormRopeAttentionCall& call,
                                                                  const AttentionGradients& gradients) {
  static const auto op =
      find_op<decltype(attention_backward_from_schema<nullptr>)>("selfattn::qk_norm_rope_attention_backward");
  const NormRopeCall& norm_rope = call.norm_rope;
  const AttentionProblem& problem = call.problem;
  return op.call(gradients.grad_out, gradients.grad_lse, norm_rope.q, norm_rope.k, problem.value, gradients.out,
                 gradients.lse, norm_rope.q_weight, norm_rope.k_weight, norm_rope.freqs_sin, norm_rope.freqs_cos,
                 problem.query_segment_ids, norm_rope.eps, norm_rope.theta, to_string(norm_rope.pairing),
                 problem.is_causal, problem.scale, problem.window_left, problem.window_right, problem.softcap);
}

}  // namespace selfattn
