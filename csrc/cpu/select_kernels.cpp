#include "cpu/select_kernels.h"

#include <ATen/Version.h>
#include <c10/util/Exception.h>

#include <string>

#include "cpu/gemm.h"

namespace selfattn::cpu {

// One namespace an instruction set, as cmake/cpu_kernels.cmake compiles them.
#define SELFATTN_DECLARE_KERNELS(CAPABILITY)              \
  namespace CAPABILITY {                                  \
  extern const ByDtype<FlashKernels> kFlashKernels;       \
  extern const ByDtype<KvCacheKernels> kKvCacheKernels;   \
  extern const ByDtype<NormRopeKernels> kNormRopeKernels; \
  }
SELFATTN_DECLARE_KERNELS(DEFAULT)
SELFATTN_DECLARE_KERNELS(AVX2)
SELFATTN_DECLARE_KERNELS(AVX512)
SELFATTN_DECLARE_KERNELS(AVX512_BF16)  // only of attention, and of bfloat16
#undef SELFATTN_DECLARE_KERNELS

namespace {

template <typename Kernels>
const Kernels& by_dtype(c10::ScalarType dtype, const ByDtype<Kernels>& kernels) {
  if (dtype == c10::kFloat) return kernels.of_float;
  if (dtype == c10::kBFloat16) return kernels.of_bfloat16;
  TORCH_INTERNAL_ASSERT(dtype == c10::kHalf);
  return kernels.of_half;
}

#if defined(SELFATTN_X86_KERNELS)
const std::string& capability() {
  static const std::string name = at::get_cpu_capability();
  return name;
}

bool has_bfloat16_products() { return capability() == "AVX512" && __builtin_cpu_supports("avx512bf16"); }

#define SELFATTN_FASTEST(KERNELS) \
  (capability() == "AVX512" ? AVX512::KERNELS : capability() == "AVX2" ? AVX2::KERNELS : DEFAULT::KERNELS)
#else
#define SELFATTN_FASTEST(KERNELS) DEFAULT::KERNELS
#endif

}  // namespace

KernelChoice select_kernels(c10::ScalarType dtype) {
#if defined(SELFATTN_X86_KERNELS)
  if (dtype == c10::kBFloat16 && has_bfloat16_products()) {
    return {&AVX512_BF16::kFlashKernels.of_bfloat16, bfloat16_matrix_unit()};
  }
#endif
  return {&by_dtype(dtype, SELFATTN_FASTEST(kFlashKernels)), nullptr};
}

const KvCacheKernels& select_kv_cache_kernels(c10::ScalarType dtype) {
#if defined(SELFATTN_X86_KERNELS)
  // Where there is a matrix unit, products of bfloat16 pairs take twice the time of float's (docs/kernels/cpu.md).
  if (dtype == c10::kBFloat16 && has_bfloat16_products() && !bfloat16_matrix_unit()) {
    return AVX512_BF16::kKvCacheKernels.of_bfloat16;
  }
#endif
  return by_dtype(dtype, SELFATTN_FASTEST(kKvCacheKernels));
}

const NormRopeKernels& select_norm_rope_kernels(c10::ScalarType dtype) {
  return by_dtype(dtype, SELFATTN_FASTEST(kNormRopeKernels));
}

}  // namespace selfattn::cpu
