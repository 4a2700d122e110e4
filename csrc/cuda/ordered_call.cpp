#include "ordered_call.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros_like.h>

#include "common/token_order.h"

namespace selfattn::cuda {
namespace {

using at::Tensor;

/// By id, padding behind the others, then by position. Ids that do not fit in int32, which is for the kernel that reads
/// them to refuse, come anywhere.
Tensor order_of_tokens(const Tensor& ids, const Tensor& positions) {
  constexpr int64_t kIds = int64_t{1} << 31;
  const Tensor bounded = ids.to(at::kLong).masked_fill(ids < 0, kIds) - kIds / 2;
  const Tensor place = bounded * (int64_t{1} << 32) + positions;
  return flat_order(place.argsort(int64_t{1}, /*descending=*/false));
}

/// (B, NH, S), the tokens in another order.
Tensor reorder_last(const Tensor& numbers, const Tensor& order) {
  return reorder(numbers.transpose(1, 2), order).transpose(1, 2).contiguous();
}

}  // namespace

OrderedCall::OrderedCall(const AttentionProblem& problem) : problem_(problem) {
  const Tensor &query_positions = *problem.query_positions, &key_positions = *problem.key_positions;
  const Tensor query_ids = problem.query_segment_ids.value_or(at::zeros_like(query_positions)),
               key_ids = problem.key_segment_ids.value_or(at::zeros_like(key_positions));
  const bool is_one_side = query_positions.is_same(key_positions) &&
                           (!problem.has_segments() || problem.query_segment_ids->is_same(*problem.key_segment_ids));
  if (!problem.is_in_order) {
    query_order_ = order_of_tokens(query_ids, query_positions);
    key_order_ = is_one_side ? query_order_ : order_of_tokens(key_ids, key_positions);
  }
  problem_.is_in_order = true;
  problem_.query = reorder(problem.query, query_order_);
  problem_.key = reorder(problem.key, key_order_), problem_.value = reorder(problem.value, key_order_);
  problem_.query_segment_ids = reorder(query_ids, query_order_);
  problem_.key_segment_ids = reorder(key_ids, key_order_);
  problem_.query_positions = reorder(query_positions, query_order_).contiguous();
  problem_.key_positions = reorder(key_positions, key_order_).contiguous();
}

AttentionGradients OrderedCall::in_order(const AttentionGradients& gradients) const {
  const auto& [grad_out, grad_lse, out, lse] = gradients;
  return {.grad_out = reorder(grad_out, query_order_),
          .grad_lse = grad_lse ? OptionalTensor(reorder_last(*grad_lse, query_order_)) : std::nullopt,
          .out = reorder(out, query_order_),
          .lse = reorder_last(lse, query_order_)};
}

AttentionResults OrderedCall::as_called(const AttentionResults& results) const {
  const Tensor back = inverse_of(query_order_);
  return {reorder(std::get<0>(results), back), reorder_last(std::get<1>(results), back)};
}

void OrderedCall::as_called_into(const Tensor& dq, const Tensor& dk, const Tensor& dv,
                                 const InputGradients& gradients) const {
  const Tensor keys_back = inverse_of(key_order_);
  reorder_into(dq, std::get<0>(gradients), inverse_of(query_order_));
  reorder_into(dk, std::get<1>(gradients), keys_back);
  reorder_into(dv, std::get<2>(gradients), keys_back);
}

}  // namespace selfattn::cuda
