#include <string>

#include "kernels.h"
#include "segments/tables.h"

namespace selfattn {
namespace cuda {
namespace {

// The family that a device is served by is the first that can.
const FlashKernels* const* families() {
  static const FlashKernels* const all[] = {&sm90_kernels(), &sm80_kernels(), &float32_kernels(), nullptr};
  return all;
}

bool suits(const FlashKernels& family, int capability) {
  return family.min_capability <= capability && capability <= family.max_capability;
}

// By its elements and by SELFATTN_FLASH_FAMILY, which is about those of 16 bits: float32 has one family.
bool is_asked_for(const FlashKernels& family, bool is_float32) {
  const std::string& forced = forced_flash_family();
  return family.is_of_float32 == is_float32 && (is_float32 || forced.empty() || forced == family.name);
}

std::string needed_capability(const FlashKernels& family) {
  const std::string least = capability_to_string(family.min_capability);
  return family.max_capability == family.min_capability ? least : least + " or newer";
}

std::string reason_against_all(int capability, bool is_float32) {
  const std::string got = capability_to_string(capability);
  const FlashKernels* last = nullptr;  // the one that asks for least
  for (const FlashKernels* const* family = families(); *family; family++) {
    if (!is_asked_for(**family, is_float32)) continue;
    if (suits(**family, capability)) {
      return "this build of selfattn holds no flash kernels for compute capability " + got +
             " (SELFATTN_SM80_ARCHITECTURES, SELFATTN_CUDA_ARCHITECTURES)";
    }
    last = *family;
  }
  const std::string needed = "compute capability " + needed_capability(*last) + "; got " + got;
  const std::string& forced = forced_flash_family();
  if (forced.empty() || is_float32) return "it needs " + needed;
  return "SELFATTN_FLASH_FAMILY=" + forced + " forces kernels that need " + needed;
}

}  // namespace

const FlashKernels* select_kernels(int device, int capability, ElementType element) {
  const bool is_float32 = element == ElementType::kFloat;
  for (const FlashKernels* const* family = families(); *family; family++) {
    if (is_asked_for(**family, is_float32) && suits(**family, capability) && (*family)->is_built_for(device) &&
        segments_are_built_for(device)) {
      return *family;
    }
  }
  return nullptr;
}

}  // namespace cuda

FlashSupport find_flash_support(int device, int capability, bool is_float32) {
  const auto element = is_float32 ? cuda::ElementType::kFloat : cuda::ElementType::kBFloat16;
  const cuda::FlashKernels* kernels = cuda::select_kernels(device, capability, element);
  if (kernels) return {&kernels->limits, {}};
  return {nullptr, cuda::reason_against_all(capability, is_float32)};
}

}  // namespace selfattn
