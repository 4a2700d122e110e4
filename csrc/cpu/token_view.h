#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/flash_kernels.h"

namespace selfattn::cpu {

constexpr int64_t kRangeElements = 32768;  // of a range of tokens that is worth a hand-over to a thread

/// The view of a tensor that with_contiguous_rows gave.
inline TokenView view_of(const at::Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

/// (B, S, N, D) with a contiguous last dimension: the tensor itself, or a copy.
inline at::Tensor with_contiguous_rows(const at::Tensor& tensor) {
  return tensor.size(3) <= 1 || tensor.stride(3) == 1 ? tensor : tensor.contiguous();
}

}  // namespace selfattn::cpu
