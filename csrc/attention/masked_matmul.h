#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace selfattn {

// The two matrix products of attention, over the allowed pairs alone: what stands in a row that a pair is not allowed
// to bring in has no influence, whatever its bits, where multiplying it by a weight of 0 would make NaN of NaN and of
// infinity. Each is the other's gradient, so this holds for gradients of any order. Under vmap and
// every torch.func transform and in forward mode, where no C++ autograd function may run, they are plain products and
// promise nothing of the kind.
//
// `allowed` is bool and broadcasts to (..., Sq, Skv); nothing: every pair is allowed. The leading dimensions of
// key and value broadcast to those of query and weight.
// On finite values the results are those of the plain products, bit by bit.

/// query (..., Sq, D), key (..., Skv, D) -> (..., Sq, Skv): query key^T at the allowed pairs, and 0 elsewhere.
at::Tensor masked_scores(const at::Tensor& query, const at::Tensor& key, const std::optional<at::Tensor>& allowed);

/// weight (..., Sq, Skv), value (..., Skv, D) -> (..., Sq, D): the sum over the allowed j of weight_ij value_j.
at::Tensor masked_product(const at::Tensor& weight, const at::Tensor& value, const std::optional<at::Tensor>& allowed);

}  // namespace selfattn
