// Integers of a call over a KV cache, of either width, as they lie.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace selfattn::cuda {

// (rows, columns) int32 or int64, any strides (in elements); data null: not given.
struct IntegerView {
  const void* data = nullptr;
  bool is_int64 = false;
  int64_t stride_row = 0, stride_column = 0;

  __host__ __device__ explicit operator bool() const { return data != nullptr; }
#ifdef __CUDACC__
  __device__ __forceinline__ const void* place(int64_t row, int64_t column) const {
    const int64_t i = row * stride_row + column * stride_column;
    return static_cast<const char*>(data) + i * (is_int64 ? sizeof(int64_t) : sizeof(int));
  }
  __device__ __forceinline__ int64_t at(int64_t row, int64_t column) const {
    const int64_t i = row * stride_row + column * stride_column;
    return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int*>(data)[i];
  }
#endif
};

}  // namespace selfattn::cuda
