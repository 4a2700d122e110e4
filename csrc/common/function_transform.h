#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace selfattn {

/// Whether a torch.func transform (vmap, grad, jvp, ...) is active on this thread.
bool is_function_transform_active();

/// Whether one other than vmap is: C++ autograd functions do not run under those, and no rule of ours serves them.
bool is_differentiation_transform_active();

/// The level of the innermost active transform, 1 for the outermost, as batched tensors name theirs.
int64_t current_transform_level();

/// Whether the tensor stands for another inside a transform: batched by either vmap of PyTorch, or tracked by grad.
bool is_wrapped_by_transform(const at::Tensor& tensor);

/// What batched tensors hold, taken out of every vmap around it: all elements of the maps at once.
at::Tensor without_maps(const at::Tensor& tensor);

/// Whether the tensor carries a forward-mode tangent.
bool has_tangent(const at::Tensor& tensor);

}  // namespace selfattn
