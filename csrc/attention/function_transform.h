#pragma once

#include <ATen/core/Tensor.h>

namespace selfattn {

/// Whether a torch.func transform (vmap, grad, jvp, ...) is active on this thread.
bool is_function_transform_active();

/// Whether the tensor carries a forward-mode tangent.
bool has_tangent(const at::Tensor& tensor);

}  // namespace selfattn
