#include "cpu/select_kernels.h"

#include <ATen/Version.h>
#include <c10/util/Exception.h>

#include <string>

#include "cpu/gemm.h"

namespace selfattn::cpu {

// One namespace an instruction set, as cmake/cpu_kernels.cmake compiles them.
#define SELFATTN_DECLARE_KERNELS(CAPABILITY)                                                          \
  namespace CAPABILITY {                                                                              \
  extern const FlashKernels kFloatKernels, kBFloat16Kernels, kHalfKernels;                            \
  extern const NormRopeKernels kFloatNormRopeKernels, kBFloat16NormRopeKernels, kHalfNormRopeKernels; \
  }
SELFATTN_DECLARE_KERNELS(DEFAULT)
SELFATTN_DECLARE_KERNELS(AVX2)
SELFATTN_DECLARE_KERNELS(AVX512)
namespace AVX512_BF16 {
extern const FlashKernels kBFloat16Kernels;
}
#undef SELFATTN_DECLARE_KERNELS

namespace {

template <typename Kernels>
const Kernels& by_dtype(c10::ScalarType dtype, const Kernels& of_float, const Kernels& of_bfloat16,
                        const Kernels& of_half) {
  if (dtype == c10::kFloat) return of_float;
  if (dtype == c10::kBFloat16) return of_bfloat16;
  TORCH_INTERNAL_ASSERT(dtype == c10::kHalf);
  return of_half;
}

#if defined(SELFATTN_X86_KERNELS)
const std::string& capability() {
  static const std::string name = at::get_cpu_capability();
  return name;
}
#endif

}  // namespace

KernelChoice select_kernels(c10::ScalarType dtype) {
#if defined(SELFATTN_X86_KERNELS)
  if (capability() == "AVX512") {
    if (dtype == c10::kBFloat16 && __builtin_cpu_supports("avx512bf16")) {
      return {&AVX512_BF16::kBFloat16Kernels, bfloat16_matrix_unit()};
    }
    return {&by_dtype(dtype, AVX512::kFloatKernels, AVX512::kBFloat16Kernels, AVX512::kHalfKernels), nullptr};
  }
  if (capability() == "AVX2") {
    return {&by_dtype(dtype, AVX2::kFloatKernels, AVX2::kBFloat16Kernels, AVX2::kHalfKernels), nullptr};
  }
#endif
  return {&by_dtype(dtype, DEFAULT::kFloatKernels, DEFAULT::kBFloat16Kernels, DEFAULT::kHalfKernels), nullptr};
}

const NormRopeKernels& select_norm_rope_kernels(c10::ScalarType dtype) {
#if defined(SELFATTN_X86_KERNELS)
  if (capability() == "AVX512") {
    return by_dtype(dtype, AVX512::kFloatNormRopeKernels, AVX512::kBFloat16NormRopeKernels,
                    AVX512::kHalfNormRopeKernels);
  }
  if (capability() == "AVX2") {
    return by_dtype(dtype, AVX2::kFloatNormRopeKernels, AVX2::kBFloat16NormRopeKernels, AVX2::kHalfNormRopeKernels);
  }
#endif
  return by_dtype(dtype, DEFAULT::kFloatNormRopeKernels, DEFAULT::kBFloat16NormRopeKernels,
                  DEFAULT::kHalfNormRopeKernels);
}

}  // namespace selfattn::cpu
