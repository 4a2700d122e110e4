// A call whose window compares positions, as the kernels take it: with the tokens of either side in order, which makes
// the keys that a query may see neighbours (SegmentProblem::positions).
#pragma once

#include "attention/gradients.h"
#include "attention/problem.h"

namespace selfattn::cuda {

class OrderedCall {
 public:
  /// Copies q, k and v into that order, on the device, if they are not said to be in it: O(tokens) memory and no host
  /// synchronisation.
  explicit OrderedCall(const AttentionProblem& problem);

  /// The same call of the tokens in order. It has ids, of a call without any 0, and positions, int32 and contiguous.
  const AttentionProblem& problem() const { return problem_; }
  bool is_copied() const { return query_order_.defined(); }

  /// Of the tokens in order, from those of the call; and the other way round.
  AttentionGradients in_order(const AttentionGradients& gradients) const;
  AttentionResults as_called(const AttentionResults& results) const;
  void as_called_into(const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv,
                      const InputGradients& gradients) const;

 private:
  AttentionProblem problem_;
  at::Tensor query_order_, key_order_;  // of common/token_order.h
};

}  // namespace selfattn::cuda
