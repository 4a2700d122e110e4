#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <optional>

namespace selfattn {

using OptionalTensor = std::optional<at::Tensor>;

/// Nothing for an undefined tensor, as autograd saves what is not there.
inline OptionalTensor as_optional(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

/// The opposite, for autograd to save.
inline at::Tensor as_saved(const OptionalTensor& tensor) { return tensor.value_or(at::Tensor()); }

/// Whether autograd records, and one of these wants a gradient.
bool any_requires_grad(std::initializer_list<OptionalTensor> tensors);

}  // namespace selfattn
