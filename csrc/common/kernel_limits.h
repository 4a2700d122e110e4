#pragma once

#include <cstdint>
#include <string>

// No torch header here: the CUDA kernels' side includes it, too.

namespace selfattn {

/// What the flash kernels of a CUDA device take.
struct KernelLimits {
  int max_head_dim;           ///< of q and k, and of v
  int64_t max_length;         ///< tokens of a row
  int64_t max_packed_length;  ///< of a row with segment ids
};

/// The limits of a CUDA device's flash kernels, or the reason why it has none.
struct FlashSupport {
  const KernelLimits* limits = nullptr;
  std::string reason;  ///< where limits is null
};

/// Of a device and its compute capability (10 * major + minor), for float32 or for 16-bit elements. is_aligned: both
/// head dimensions are whole multiples of 16 bytes.
FlashSupport find_flash_support(int device, int capability, bool is_float32, bool is_aligned);

/// "8.6" for 86.
std::string capability_to_string(int capability);

/// The family of kernels that the environment variable SELFATTN_FLASH_FAMILY forces ("sm80" or "sm90"), for tests and
/// comparisons; empty where it is not set. Read once a process. ValueError for another value, at every call.
const std::string& forced_flash_family();

}  // namespace selfattn
