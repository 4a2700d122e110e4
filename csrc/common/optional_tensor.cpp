#include "common/optional_tensor.h"

#include <ATen/core/grad_mode.h>

#include <algorithm>

namespace selfattn {

bool any_requires_grad(std::initializer_list<OptionalTensor> tensors) {
  return at::GradMode::is_enabled() && std::any_of(tensors.begin(), tensors.end(), [](const OptionalTensor& tensor) {
           return tensor && tensor->defined() && tensor->requires_grad();
         });
}

}  // namespace selfattn
