#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace selfattn {
namespace cuda {
namespace {

// What SELFATTN_FLASH_FAMILY asks for, for tests and comparisons; read once.
const std::string& forced_family() {
  static const std::string family = [] {
    const char* value = std::getenv("SELFATTN_FLASH_FAMILY");
    const std::string name = value ? value : "";
    if (!name.empty() && name != "sm80" && name != "sm90") {
      throw std::invalid_argument("selfattn: SELFATTN_FLASH_FAMILY must be sm80 or sm90; got " + name);
    }
    return name;
  }();
  return family;
}

}  // namespace

const FlashKernels* select_kernels(int capability) {
  constexpr int kAmpere = 80, kHopper = 90;
  const std::string& forced = forced_family();
  if (capability == kHopper && forced != "sm80") return &sm90_kernels();
  return capability >= kAmpere && forced != "sm90" ? &sm80_kernels() : nullptr;
}

}  // namespace cuda

const KernelLimits* flash_kernel_limits(int capability) {
  const cuda::FlashKernels* kernels = cuda::select_kernels(capability);
  return kernels ? &kernels->limits : nullptr;
}

}  // namespace selfattn
