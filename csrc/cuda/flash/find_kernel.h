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

// Those of the call's row layout.
template <class Kernel, int kAligned, int kUnaligned>
const Kernel* find_kernel(const Kernel (&aligned)[kAligned], const Kernel (&unaligned)[kUnaligned],
                          const AttentionShape& shape, int element_bytes) {
  return row_layout(shape, element_bytes) == RowLayout::kAligned ? find_kernel(aligned, shape)
                                                                 : find_kernel(unaligned, shape);
}

}  // namespace selfattn::cuda
