#include "cpu/select_kernels.h"

#include <ATen/Version.h>
#include <c10/util/Exception.h>

#include <string>

#include "cpu/gemm.h"

namespace selfattn::cpu {

// One namespace an instruction set, as cmake/cpu_kernels.cmake compiles them.
#define SELFATTN_DECLARE_KERNELS(CAPABILITY)                               \
  namespace CAPABILITY {                                                   \
  extern const FlashKernels kFloatKernels, kBFloat16Kernels, kHalfKernels; \
  }
SELFATTN_DECLARE_KERNELS(DEFAULT)
SELFATTN_DECLARE_KERNELS(AVX2)
SELFATTN_DECLARE_KERNELS(AVX512)
namespace AVX512_BF16 {
extern const FlashKernels kBFloat16Kernels;
}
#undef SELFATTN_DECLARE_KERNELS

namespace {

const FlashKernels* by_dtype(c10::ScalarType dtype, const FlashKernels& of_float, const FlashKernels& of_bfloat16,
                             const FlashKernels& of_half) {
  if (dtype == c10::kFloat) return &of_float;
  if (dtype == c10::kBFloat16) return &of_bfloat16;
  TORCH_INTERNAL_ASSERT(dtype == c10::kHalf);
  return &of_half;
}

}  // namespace

KernelChoice select_kernels(c10::ScalarType dtype) {
#if defined(SELFATTN_X86_KERNELS)
  static const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") {
    if (dtype == c10::kBFloat16 && __builtin_cpu_supports("avx512bf16")) {
      return {&AVX512_BF16::kBFloat16Kernels, bfloat16_matrix_unit()};
    }
    return {by_dtype(dtype, AVX512::kFloatKernels, AVX512::kBFloat16Kernels, AVX512::kHalfKernels), nullptr};
  }
  if (capability == "AVX2") {
    return {by_dtype(dtype, AVX2::kFloatKernels, AVX2::kBFloat16Kernels, AVX2::kHalfKernels), nullptr};
  }
#endif
  return {by_dtype(dtype, DEFAULT::kFloatKernels, DEFAULT::kBFloat16Kernels, DEFAULT::kHalfKernels), nullptr};
}

}  // namespace selfattn::cpu
