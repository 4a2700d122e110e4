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

/// qk_norm_rope_attention and qk_norm_rope_attention_backward: the only place in C++ where their arguments are listed.
/// `Grads`: before the others, grad_out and grad_lse of the gradient. `Results`: after v, its out and lse. `Sinks`:
/// last, those of the operator itself.
template <typename Result, typename Grads, typename Results, typename Sinks>
struct NormRopeAttentionOp;

template <typename Result, typename... Grads, typename... Results, typename... Sinks>
struct NormRopeAttentionOp<Result, Types<Grads...>, Types<Results...>, Types<Sinks...>> {
  /// An implementation with the arguments of the schema, which can be registered. It validates the call.
  template <auto kImplementation>
  static Result from_schema(Grads... grads, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            Results... results, const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                            const OptionalTensor& freqs_sin, const OptionalTensor& freqs_cos,
                            const OptionalTensor& segment_ids, double eps, double theta, c10::string_view pairing,
                            bool causal, std::optional<double> qk_scale, int64_t window_left, int64_t window_right,
                            double softcap, Sinks... sinks) {
    const NormRopeAttentionCall call = make_norm_rope_attention_call(
        {q, k, q_weight, k_weight, freqs_sin, freqs_cos, /*norm=*/true, eps, /*rope=*/true, /*positions=*/std::nullopt,
         theta, parse_pairing(pairing, "pairing")},
        v, {segment_ids, causal, qk_scale, std::nullopt, window_left, window_right, softcap, sinks...});
    if constexpr (sizeof...(Grads) == 0) {
      return kImplementation(call);
    } else {
      const AttentionGradients gradients{grads..., results...};
      check_gradients(call.problem, gradients);
      return kImplementation(call, gradients);
    }
  }

  /// Through the dispatcher.
  static Result call(const NormRopeAttentionCall& call, Grads... grads, Results... results, Sinks... sinks) {
    static const auto op = find_op<decltype(from_schema<nullptr>)>(
        sizeof...(Grads) == 0 ? "selfattn::qk_norm_rope_attention" : "selfattn::qk_norm_rope_attention_backward");
    const auto& [norm_rope, problem] = call;
    return op.call(grads..., norm_rope.q, norm_rope.k, problem.value, results..., norm_rope.q_weight,
                   norm_rope.k_weight, norm_rope.freqs_sin, norm_rope.freqs_cos, problem.query_segment_ids,
                   norm_rope.eps, norm_rope.theta, to_string(norm_rope.pairing), problem.is_causal, problem.scale,
                   problem.window_left, problem.window_right, problem.softcap, sinks...);
  }
};

using NormRopeAttention = NormRopeAttentionOp<AttentionResults, Types<>, Types<>, Types<const OptionalTensor&>>;
using NormRopeAttentionBackward =
    NormRopeAttentionOp<NormRopeAttentionGradients, Types<const at::Tensor&, const OptionalTensor&>,
                        Types<const at::Tensor&, const at::Tensor&>, Types<>>;

inline AttentionResults qk_norm_rope_attention(const NormRopeAttentionCall& call) {
  return NormRopeAttention::call(call, call.problem.sinks);
}

inline NormRopeAttentionGradients qk_norm_rope_attention_backward(const NormRopeAttentionCall& call,
                                                                  const AttentionGradients& gradients) {
  const auto& [grad_out, grad_lse, out, lse] = gradients;
  return NormRopeAttentionBackward::call(call, grad_out, grad_lse, out, lse);
}

}  // namespace selfattn
