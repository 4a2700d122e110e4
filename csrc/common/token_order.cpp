#include "common/token_order.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/index_select.h>

namespace selfattn {

using at::Tensor;

Tensor flat_order(const Tensor& order_of_rows) {
  const Tensor begins = at::arange(order_of_rows.size(0), order_of_rows.options()) * order_of_rows.size(1);
  return (order_of_rows + begins.unsqueeze(1)).flatten();
}

Tensor inverse_of(const Tensor& order) {
  return order.defined() ? at::empty_like(order).scatter_(0, order, at::arange(order.numel(), order.options())) : order;
}

Tensor reorder(const Tensor& tokens, const Tensor& order) {
  return order.defined() ? tokens.flatten(0, 1).index_select(0, order).view(tokens.sizes()) : tokens;
}

void reorder_into(const Tensor& result, const Tensor& tokens, const Tensor& order) {
  if (!order.defined()) {
    result.copy_(tokens);
    return;
  }
  Tensor rows = result.flatten(0, 1);
  at::index_select_out(rows, tokens.flatten(0, 1), 0, order);
}

}  // namespace selfattn
