#include "flash/tensor_map.h"

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace selfattn::cuda {
namespace {

PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    constexpr unsigned kCudaVersion = 12000;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, kCudaVersion, cudaEnableDefault, &found);
    if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) {
      throw std::runtime_error(
          "selfattn: the CUDA driver has no cuTensorMapEncodeTiled; expected a driver for CUDA 12 or newer");
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  }();
  return encoder;
}

// Gives this thread the context of its device, which the driver wants and a thread has only from its first use of the
// runtime on. An autograd thread may come here first.
bool bind_context() {
  int device;
  return cudaGetDevice(&device) == cudaSuccess && cudaSetDevice(device) == cudaSuccess;
}

}  // namespace

CUtensorMap make_tensor_map(const TensorView& view, ElementType element, int batch, int length, int heads, int dim,
                            int rows, CUtensorMapL2promotion promotion) {
  constexpr cuuint64_t kElementBytes = 2;
  const cuuint64_t sizes[4] = {cuuint64_t(dim), cuuint64_t(length), cuuint64_t(heads), cuuint64_t(batch)};
  // A dimension of size 1 may come with any stride; the encoder wants a positive multiple of 16 bytes all the same.
  const auto stride_bytes = [&](int64_t stride, int size) {
    return (size == 1 ? cuuint64_t(dim) : cuuint64_t(stride)) * kElementBytes;
  };
  const cuuint64_t strides[3] = {stride_bytes(view.stride_token, length), stride_bytes(view.stride_head, heads),
                                 stride_bytes(view.stride_batch, batch)};
  const cuuint32_t box[4] = {kPanelColumns, cuuint32_t(rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const auto encode = [&] {
    return tensor_map_encoder()(
        &map, element == ElementType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
        view.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, promotion,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  thread_local const bool is_bound = bind_context();
  CUresult status = is_bound ? encode() : CUDA_ERROR_INVALID_CONTEXT;
  if (status == CUDA_ERROR_INVALID_CONTEXT && bind_context()) status = encode();  // somebody took it away
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("selfattn: cuTensorMapEncodeTiled failed with status " + std::to_string(int(status)) +
                             " for sizes (" + std::to_string(batch) + ", " + std::to_string(length) + ", " +
                             std::to_string(heads) + ", " + std::to_string(dim) + ")");
  }
  return map;
}

}  // namespace selfattn::cuda
