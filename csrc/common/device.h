#pragma once

#include <optional>

#include <c10/core/Device.h>

namespace selfattn {

/// Compute capability of a CUDA device as 10 * major + minor (86 for 8.6); nothing in a build without CUDA, and
/// where there is no such device, as fake tensors may have.
std::optional<int> compute_capability(const c10::Device& device);

}  // namespace selfattn
