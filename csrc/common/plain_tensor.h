#pragma once

#include <ATen/core/Tensor.h>

namespace selfattn {

/// Whether the tensor is an ordinary one in memory, outside of any tracing: no layout of its own, no subclass, and no
/// mode that sees every operator. Such a tensor's memory may be read and written by hand.
bool is_plain(const at::Tensor& tensor);

/// Whether autocast is on for the tensor's device.
bool is_autocast_on(const at::Tensor& tensor);

}  // namespace selfattn
