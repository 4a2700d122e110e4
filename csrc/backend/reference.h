#pragma once

#include "attention/gradients.h"

namespace selfattn {

/// softmax(scale * Q K^T) V over the allowed pairs, in ATen operators, differentiable any number of times. Scores,
/// softmax and lse are float32, or float64 for float64 inputs. Memory O(B * NH * Sq * Skv).
/// What a query may not attend to has no influence, whatever its bits (attention/masked_matmul.h says where not).
/// A sink of -inf is none, one of +inf takes all the weight: out 0, lse +inf.
/// -> out (B, Sq, NH, DV) in q's dtype; lse (B, NH, Sq) float32, -inf for a row without an allowed pair.
AttentionResults reference_attention(const AttentionProblem& problem);

/// The same under a mask in the place of the problem's own rules: `allowed` is bool and broadcasts to (B, 1, Sq, Skv);
/// nothing: every pair is allowed.
AttentionResults reference_attention(const AttentionProblem& problem, const OptionalTensor& allowed);

/// The gradient of reference_attention from the saved out and lse: P = exp(S - lse), dS = P * (dP - rowsum(dO * O) +
/// dlse) (FlashAttention-2, arXiv:2307.08691, section 3.1.2), in differentiable ATen operators: the gradient of a
/// backend without a backward kernel of its own, and what makes kernels twice differentiable.
/// -> dq, dk, dv in the inputs' shapes and dtype.
InputGradients reference_attention_backward(const AttentionProblem& problem, const AttentionGradients& gradients);

/// d loss / d sinks (NH,): a sink is a logit without a value, so dS of its column is P * (dlse - rowsum(dO * O)). Of a
/// sink of -inf it is 0, of one of +inf the sum of dlse.
at::Tensor sinks_gradient(const at::Tensor& sinks, const AttentionGradients& gradients);

}  // namespace selfattn
