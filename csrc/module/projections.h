#pragma once

#include <tuple>

#include "common/optional_tensor.h"

namespace selfattn {

/// A linear layer's parameters.
struct Projection {
  const at::Tensor& weight;  // (out features, E)
  const OptionalTensor& bias;
};

/// The three projections of x (B, S, E), each (B, S, out features): at::linear of each. Where a gradient is wanted and
/// plain tensors are at work, they are one node of the graph, which keeps x once and adds the three parts of its
/// gradient inside the matrix products.
std::tuple<at::Tensor, at::Tensor, at::Tensor> project_query_key_value(const at::Tensor& x, const Projection& query,
                                                                       const Projection& key, const Projection& value);

}  // namespace selfattn
