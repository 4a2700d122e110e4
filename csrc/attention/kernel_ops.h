#pragma once

#include <tuple>

#include "attention/problem.h"
#include "backend/reference.h"

namespace selfattn {

/// selfattn::flash_attention through the dispatcher: (out, lse).
std::tuple<at::Tensor, at::Tensor> flash_attention(const AttentionProblem& problem);

/// selfattn::flash_attention_backward through the dispatcher: (dq, dk, dv).
std::tuple<at::Tensor, at::Tensor, at::Tensor> flash_attention_backward(const AttentionProblem& problem,
                                                                        const AttentionGradients& gradients);

/// Memory that is free for gradients: contiguous, of the gradient's shape and dtype. That of dq may be out's, that of
/// dk k's, that of dv v's. What is not there is allocated.
struct GradientMemory {
  OptionalTensor query = std::nullopt, key = std::nullopt, value = std::nullopt;
};

/// selfattn::flash_attention_backward.into through the dispatcher: (dq, dk, dv), not differentiable.
std::tuple<at::Tensor, at::Tensor, at::Tensor> flash_attention_backward_into(const AttentionProblem& problem,
                                                                             const AttentionGradients& gradients,
                                                                             const GradientMemory& memory);

/// make_attention_problem for a kernel: also holds the call to the flash backend's constraints and throws
/// c10::NotImplementedError with every reason where it does not meet them.
AttentionProblem make_flash_problem(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                    const AttentionArguments& arguments);

}  // namespace selfattn
