#pragma once

#include <array>
#include <string_view>

#include <selfattn/export.h>

namespace selfattn {

/// The implementations behind `multihead_attention`, in the order in which `auto` prefers them.
enum class Backend {
  kFlash,      ///< this project's own kernels, CPU and CUDA
  kCudnn,      ///< ATen's cuDNN scaled-dot-product attention, CUDA only
  kAten,       ///< at::scaled_dot_product_attention, with a mask only where one is needed
  kReference,  ///< the formula in ATen operators
  kAuto,       ///< the first of the above that can serve
};

/// The backends that compute, in `auto`'s order.
inline constexpr std::array<Backend, 4> kBackendsByPreference = {Backend::kFlash, Backend::kCudnn, Backend::kAten,
                                                                 Backend::kReference};

/// "flash", "cudnn", "aten", "reference" or "auto".
SELFATTN_API std::string_view to_string(Backend backend);

/// Reads a backend's name or alias ("pallas_triton" and "triton" mean flash, "xla" means aten).
/// Throws c10::ValueError that lists the names when `name` is none of them.
SELFATTN_API Backend parse_backend(std::string_view name);

}  // namespace selfattn
