#include <string>

#include "kernels.h"
#include "segments/tables.h"

namespace selfattn {
namespace cuda {
namespace {

// The family that a device is served by is the first that can.
const FlashKernels* const* families() {
  static const FlashKernels* const all[] = {&sm90_kernels(), &sm80_kernels(), &unaligned_kernels(), &float32_kernels(),
                                            nullptr};
  return all;
}

bool suits(const FlashKernels& family, int capability) {
  return family.min_capability <= capability && capability <= family.max_capability;
}

struct Rows {
  bool is_float32;
  RowLayout layout;

  // Float32 and unaligned rows have one family each, which SELFATTN_FLASH_FAMILY is not about.
  bool has_choice() const { return !is_float32 && layout == RowLayout::kAligned; }
};

bool is_asked_for(const FlashKernels& family, const Rows& rows) {
  if (rows.is_float32) return family.is_of_float32;
  const bool is_for_them = !family.is_of_float32 && family.is_of_unaligned == (rows.layout == RowLayout::kUnaligned);
  const std::string& forced = forced_flash_family();
  return is_for_them && (!rows.has_choice() || forced.empty() || forced == family.name);
}

std::string needed_capability(const FlashKernels& family) {
  const std::string least = capability_to_string(family.min_capability);
  return family.max_capability == family.min_capability ? least : least + " or newer";
}

std::string reason_against_all(int capability, const Rows& rows) {
  const std::string got = capability_to_string(capability);
  const FlashKernels* last = nullptr;  // the one that asks for least
  for (const FlashKernels* const* family = families(); *family; family++) {
    if (!is_asked_for(**family, rows)) continue;
    if (suits(**family, capability)) {
      return "this build of selfattn holds no flash kernels for compute capability " + got +
             " (TORCH_CUDA_ARCH_LIST says at build time what it is compiled for)";
    }
    last = *family;
  }
  const std::string needed = "compute capability " + needed_capability(*last) + "; got " + got;
  const std::string& forced = forced_flash_family();
  if (forced.empty() || !rows.has_choice()) return "it needs " + needed;
  return "SELFATTN_FLASH_FAMILY=" + forced + " forces kernels that need " + needed;
}

}  // namespace

const FlashKernels* select_kernels(int device, int capability, ElementType element, RowLayout layout) {
  const Rows rows{element == ElementType::kFloat, layout};
  for (const FlashKernels* const* family = families(); *family; family++) {
    if (is_asked_for(**family, rows) && suits(**family, capability) && (*family)->is_built_for(device) &&
        segments_are_built_for(device)) {
      return *family;
    }
  }
  return nullptr;
}

}  // namespace cuda

FlashSupport find_flash_support(int device, int capability, bool is_float32, bool is_aligned) {
  const auto element = is_float32 ? cuda::ElementType::kFloat : cuda::ElementType::kBFloat16;
  const auto layout = is_aligned ? cuda::RowLayout::kAligned : cuda::RowLayout::kUnaligned;
  const cuda::FlashKernels* kernels = cuda::select_kernels(device, capability, element, layout);
  if (kernels) return {&kernels->limits, {}};
  return {nullptr, cuda::reason_against_all(capability, {is_float32, layout})};
}

}  // namespace selfattn
