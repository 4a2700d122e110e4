// The C++ type of an ElementType.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "flash/params.h"

namespace selfattn::cuda {

template <ElementType kElement>
struct ElementOf {
  using Type = __nv_bfloat16;
};
template <>
struct ElementOf<ElementType::kHalf> {
  using Type = __half;
};

}  // namespace selfattn::cuda
