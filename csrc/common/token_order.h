#pragma once

#include <ATen/core/Tensor.h>

// Tokens (B, S, ...) in another order, each row its own: (B * S,) int64, of the tokens of all rows which comes first,
// second, ... An undefined order leaves them as they stand.

namespace selfattn {

/// Of (B, S) int64, which token of its row comes first, second, ...
at::Tensor flat_order(const at::Tensor& order_of_rows);

/// The order that takes `order` back.
at::Tensor inverse_of(const at::Tensor& order);

/// (B, S, ...) in that order.
at::Tensor reorder(const at::Tensor& tokens, const at::Tensor& order);

/// The same into `result`, contiguous and of the tokens' shape and dtype.
void reorder_into(const at::Tensor& result, const at::Tensor& tokens, const at::Tensor& order);

}  // namespace selfattn
