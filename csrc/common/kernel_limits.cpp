#include "common/kernel_limits.h"

#include <c10/util/Exception.h>

#include <cstdlib>

namespace selfattn {

#ifndef SELFATTN_WITH_CUDA  // else csrc/cuda/flash/select_kernels.cu knows
FlashSupport find_flash_support(int, int, bool, bool) { return {nullptr, "this build of selfattn has no CUDA part"}; }
#endif

std::string capability_to_string(int capability) {
  return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

const std::string& forced_flash_family() {
  static const std::string family = [] {
    const char* value = std::getenv("SELFATTN_FLASH_FAMILY");
    return std::string(value ? value : "");
  }();
  TORCH_CHECK_VALUE(family.empty() || family == "sm80" || family == "sm90",
                    "selfattn: the environment variable SELFATTN_FLASH_FAMILY must be sm80, sm90 or unset; got '",
                    family, "'");
  return family;
}

}  // namespace selfattn
