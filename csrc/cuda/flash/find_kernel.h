// Kernels are made for pairs of head dimensions; a call takes the narrowest pair that holds its own.
#pragma once
#include "params.h"

namespace selfattn::cuda {

// `kernels` ascend, each with its dim_qk and dim_v. Null where none holds the shape.
template <class Kernel, int kCount>
const Kernel* find_kernel(const Kernel (&kernels)[kCount], const AttentionShape& shape) {
  for (const Kernel& kernel : kernels) {
    if (shape.dim_qk <= kernel.dim_qk && shape.dim_v <= kernel.dim_v) return &kernel;
  }
  return nullptr;
}

}  // namespace selfattn::cuda
