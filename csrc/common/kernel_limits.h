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

/// What kernels copy at a time.
constexpr int kRowChunkBytes = 16;

/// What the CUDA kernels over a KV cache take: pages of a multiple of kCachePageMultiple tokens where a row has
/// several, and less than kMaxCacheWork pieces of kCacheTileRows query heads with kCacheUnitKeys keys, which they
/// count.
constexpr int kCachePageMultiple = 16, kCacheUnitKeys = 64, kCacheTileRows = 8;
constexpr int64_t kMaxCacheWork = int64_t(1) << 30;

/// Whether rows of these head dimensions are whole multiples of that: other kernels serve those that are not. Int: an
/// integer, or a symbolic one.
template <class Int>
bool are_rows_aligned(const Int& head_dim, const Int& value_head_dim, int64_t element_bytes) {
  const int64_t chunk = kRowChunkBytes / element_bytes;
  return head_dim % chunk == 0 && value_head_dim % chunk == 0;
}

/// The limits of a CUDA device's flash kernels, or the reason why it has none.
struct FlashSupport {
  const KernelLimits* limits = nullptr;
  std::string reason;  ///< where limits is null
};

/// Of a device and its compute capability (10 * major + minor), for float32 or for 16-bit elements. is_aligned:
/// are_rows_aligned.
FlashSupport find_flash_support(int device, int capability, bool is_float32, bool is_aligned);

/// "8.6" for 86.
std::string capability_to_string(int capability);

/// The family of kernels that the environment variable SELFATTN_FLASH_FAMILY forces ("sm80" or "sm90"), for tests and
/// comparisons; empty where it is not set. Read once a process. ValueError for another value, at every call.
const std::string& forced_flash_family();

}  // namespace selfattn
