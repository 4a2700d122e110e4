#pragma once

#include "distributed/context_problem.h"

namespace selfattn {

// One layer's attention over the ranks' shards, below autograd.

ContextResults context_parallel_forward(const ContextProblem& problem);

ContextGradients context_parallel_backward(const ContextProblem& problem, const at::Tensor& grad_out,
                                           const at::Tensor& out, const at::Tensor& lse, const at::Tensor& shared_lse,
                                           at::TensorList exchanged);

}  // namespace selfattn
