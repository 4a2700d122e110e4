#pragma once

#include <type_traits>

#include "attention/gradients.h"
#include "attention/problem.h"
#include "common/dispatch.h"

// The operators flash_attention, flash_attention_backward and flash_attention_backward.into, for those who implement
// them and for those who call them: the only place in C++ where their arguments are listed.

namespace selfattn {

// from_schema<implementation> is what can be registered. It validates the call, with `needs_lse`; of gradients and
// memory nothing is checked yet: an implementation does that, or stands in `checked` (below).

template <AttentionResults (*kImplementation)(const AttentionProblem&)>
AttentionResults flash_attention_from_schema(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                             const OptionalTensor& segment_ids, bool causal,
                                             std::optional<double> qk_scale, const OptionalTensor& kv_segment_ids,
                                             int64_t window_left, int64_t window_right, double softcap,
                                             const OptionalTensor& sinks, const OptionalTensor& positions,
                                             const OptionalTensor& kv_positions, bool in_order) {
  return kImplementation(make_attention_problem(q, k, v,
                                                {segment_ids, causal, qk_scale, kv_segment_ids, window_left,
                                                 window_right, softcap, sinks, positions, kv_positions, in_order},
                                                /*needs_lse=*/true));
}

/// Through the dispatcher.
inline AttentionResults flash_attention(const AttentionProblem& problem) {
  static const auto op = find_op<decltype(flash_attention_from_schema<nullptr>)>("selfattn::flash_attention");
  return op.call(problem.query, problem.key, problem.value, problem.query_segment_ids, problem.is_causal, problem.scale,
                 problem.key_segment_ids, problem.window_left, problem.window_right, problem.softcap, problem.sinks,
                 problem.query_positions, problem.key_positions, problem.is_in_order);
}

/// Both overloads of the gradient. `memory`: nothing, or for .into that of dq, dk and dv.
template <typename Result, typename... Memory>
struct FlashAttentionBackwardOp {
  template <Result (*kImplementation)(const AttentionProblem&, const AttentionGradients&, const Memory&...)>
  static Result from_schema(const at::Tensor& grad_out, const OptionalTensor& grad_lse, const at::Tensor& q,
                            const at::Tensor& k, const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse,
                            const OptionalTensor& segment_ids, bool causal, std::optional<double> qk_scale,
                            const OptionalTensor& kv_segment_ids, int64_t window_left, int64_t window_right,
                            double softcap, Memory&... memory, const OptionalTensor& positions,
                            const OptionalTensor& kv_positions, bool in_order) {
    const AttentionProblem problem =
        make_attention_problem(q, k, v,
                               {segment_ids, causal, qk_scale, kv_segment_ids, window_left, window_right, softcap,
                                /*sinks=*/std::nullopt, positions, kv_positions, in_order},
                               /*needs_lse=*/true);
    return kImplementation(problem, {grad_out, grad_lse, out, lse}, memory...);
  }

  static Result call(const AttentionProblem& problem, const AttentionGradients& gradients, Memory&... memory) {
    static const auto op = find_op<decltype(from_schema<nullptr>)>("selfattn::flash_attention_backward",
                                                                   sizeof...(Memory) == 0 ? "" : "into");
    return op.call(gradients.grad_out, gradients.grad_lse, problem.query, problem.key, problem.value, gradients.out,
                   gradients.lse, problem.query_segment_ids, problem.is_causal, problem.scale, problem.key_segment_ids,
                   problem.window_left, problem.window_right, problem.softcap, memory..., problem.query_positions,
                   problem.key_positions, problem.is_in_order);
  }
};

using FlashAttentionBackward = FlashAttentionBackwardOp<InputGradients>;
/// dq may be out, dk may be k, dv may be v. Not differentiable.
using FlashAttentionBackwardInto = FlashAttentionBackwardOp<void, at::Tensor, at::Tensor, at::Tensor>;

inline InputGradients flash_attention_backward(const AttentionProblem& problem, const AttentionGradients& gradients) {
  return FlashAttentionBackward::call(problem, gradients);
}

/// flash_attention_backward, over that memory where there is any and the device can.
InputGradients flash_attention_backward(const AttentionProblem& problem, const AttentionGradients& gradients,
                                        const GradientMemory& memory);

/// flash_attention_backward.into through flash_attention_backward, whose results are copied: for what has no kernel
/// that writes into given memory.
void copy_attention_backward(const AttentionProblem& problem, const AttentionGradients& gradients, const at::Tensor& dq,
                             const at::Tensor& dk, const at::Tensor& dv);

// ---------------------------------------------------------------- what a kernel checks
// A kernel can be called by anyone. Beyond a valid call it needs what the flash backend's constraints say, else
// c10::NotImplementedError with every reason; gradients that fit the call; and memory that can take the results.

void check_kernel_call(const AttentionProblem& problem);
void check_kernel_call(const AttentionProblem& problem, const AttentionGradients& gradients);
void check_kernel_call(const AttentionProblem& problem, const AttentionGradients& gradients, const at::Tensor& dq,
                       const at::Tensor& dk, const at::Tensor& dv);

/// A kernel behind these checks: flash_attention_from_schema<checked<kernel>>.
template <auto kKernel, typename... Arguments>
std::invoke_result_t<decltype(kKernel), const Arguments&...> checked(const Arguments&... arguments) {
  check_kernel_call(arguments...);
  return kKernel(arguments...);
}

}  // namespace selfattn
