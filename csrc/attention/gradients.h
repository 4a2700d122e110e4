#pragma once

#include <tuple>

#include "attention/problem.h"

namespace selfattn {

/// out (B, Sq, NH, DV) in q's dtype; lse (B, NH, Sq) float32.
using AttentionResults = std::tuple<at::Tensor, at::Tensor>;

/// dq, dk, dv, in the inputs' shapes and dtype.
using InputGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

/// What a forward pass saved and received, for the gradient.
struct AttentionGradients {
  at::Tensor grad_out;      // (B, Sq, NH, DV)
  OptionalTensor grad_lse;  // (B, NH, Sq)
  at::Tensor out;           // (B, Sq, NH, DV)
  at::Tensor lse;           // (B, NH, Sq)
};

/// Memory that is free for gradients: contiguous, of the gradient's shape and dtype. That of dq may be out's, that of
/// dk k's, that of dv v's. What is not there is allocated.
struct GradientMemory {
  OptionalTensor query = std::nullopt, key = std::nullopt, value = std::nullopt;
};

/// Contiguous results and gradients for a call, not filled.
AttentionResults empty_results(const AttentionProblem& problem);
InputGradients empty_gradients(const AttentionProblem& problem);

/// Throws where what a gradient is made of does not fit the call: grad_out and out of its results' shape and q's dtype,
/// lse and grad_lse (B, NH, Sq) float32, all on q's device. Any strides. Sizes may be symbolic.
void check_gradients(const AttentionProblem& problem, const AttentionGradients& gradients);

/// Throws where the memory for the results is not contiguous, of the inputs' shapes, dtype and device, or overlaps what
/// is still read: dq may be all of out, dk all of k and dv all of v, and nothing else.
void check_gradient_memory(const AttentionProblem& problem, const AttentionGradients& gradients, const at::Tensor& dq,
                           const at::Tensor& dk, const at::Tensor& dv);

}  // namespace selfattn
