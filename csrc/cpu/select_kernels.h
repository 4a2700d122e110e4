#pragma once

#include <c10/core/ScalarType.h>

#include "cpu/flash_kernels.h"
#include "cpu/kv_cache_kernels.h"
#include "cpu/qk_norm_rope_kernels.h"

namespace selfattn::cpu {

struct KernelChoice {
  const FlashKernels* kernels;
  PanelGemm matrix_unit;  // or null
};

/// The fastest kernels that this CPU, and ATEN_CPU_CAPABILITY, allow for tensors of float32, bfloat16 or float16.
KernelChoice select_kernels(c10::ScalarType dtype);

/// Likewise for attention over a KV cache.
const KvCacheKernels& select_kv_cache_kernels(c10::ScalarType dtype);

/// Likewise for qk_norm_rope.
const NormRopeKernels& select_norm_rope_kernels(c10::ScalarType dtype);

}  // namespace selfattn::cpu
