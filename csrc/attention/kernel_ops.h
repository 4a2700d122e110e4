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

/// Throws where what a gradient is made of does not fit the call: grad_out and out of its results' shape and q's dtype,
/// lse and grad_lse (B, NH, Sq) float32, all on q's device. Any strides. Sizes may be symbolic.
void check_gradients(const AttentionProblem& problem, const AttentionGradients& gradients);

/// Throws where the memory for the results is not contiguous, of the inputs' shapes, dtype and device, or overlaps what
/// is still read: dq may be all of out, dk all of k and dv all of v, and nothing else.
void check_gradient_memory(const AttentionProblem& problem, const AttentionGradients& gradients, const at::Tensor& dq,
                           const at::Tensor& dk, const at::Tensor& dv);

}  // namespace selfattn
