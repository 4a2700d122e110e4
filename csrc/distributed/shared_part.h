#pragma once

#include <tuple>
#include <vector>

#include "distributed/context_part.h"
#include "distributed/context_problem.h"

// The shared part of a call, in two steps of which it may need one alone. A heads group of h ranks exchanges tokens for
// heads: (B, shared, NH, D) of each become (B, h * shared, NH / h, D). Then a keys group gathers the keys and values of
// these heads. Every collective is started before the local part, or before the next group of heads, and waited for
// behind it: on CUDA it then runs beside those kernels.

namespace selfattn {

/// What is on its way between ranks, a tensor for each group of heads; none for a step that the call does not need.
/// Heads travel in groups, so that the first are attended to while others travel, and what goes back does while others
/// are computed.
struct SharedTransfers {
  int64_t groups = 1;
  std::vector<at::Tensor> heads, keys;
};

/// Throws c10::ValueError, before any collective, where a group is of another size.
SharedTransfers start_shared_forward(const ContextProblem& problem);

/// out (B, shared, NH, DV) of this rank's tokens, then lse and `exchanged` as ContextResults has them.
std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>> finish_shared_forward(const ContextProblem& problem,
                                                                                  SharedTransfers started);

/// grad_out (B, shared, NH, DV)
SharedTransfers start_shared_backward(const ContextProblem& problem, const at::Tensor& grad_out,
                                      at::TensorList exchanged);

/// Of this rank's tokens; `gradients` with its grad_out and out (B, shared, NH, DV), and lse as the forward pass gave
/// it.
PartGradients finish_shared_backward(const ContextProblem& problem, SharedTransfers started,
                                     const AttentionGradients& gradients, at::TensorList exchanged);

}  // namespace selfattn
