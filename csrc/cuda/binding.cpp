#include "binding.h"

#include <ATen/Context.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/EmptyTensor.h>
#include <c10/cuda/CUDAFunctions.h>

#include <algorithm>
#include <cmath>

namespace selfattn::cuda {
namespace {

int window_side(int64_t size) {
  return size < 0 || size > AttentionWindow::kUnbounded ? AttentionWindow::kUnbounded : static_cast<int>(size);
}

}  // namespace

const FlashKernels& flash_kernels(ElementType element, RowLayout layout) {
  const cudaDeviceProp* device = at::cuda::getCurrentDeviceProperties();
  const FlashKernels* kernels =
      select_kernels(c10::cuda::current_device(), 10 * device->major + device->minor, element, layout);
  TORCH_INTERNAL_ASSERT(kernels, "selfattn: no flash kernels for this device");
  return *kernels;
}

at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype, at::Device device) {
  return at::Tensor(at::detail::empty_cuda(sizes, dtype, device, std::nullopt));
}

at::Tensor empty_like_contiguous(const at::Tensor& tensor) {
  return empty(tensor.sizes(), tensor.scalar_type(), tensor.device());
}

bool has_kernel_layout(const at::Tensor& tensor, RowLayout layout) {
  const int64_t chunk_bytes = layout == RowLayout::kAligned ? kRowChunkBytes : tensor.element_size();
  if (tensor.stride(3) != 1 || reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % chunk_bytes != 0) return false;
  const int64_t chunk = chunk_bytes / tensor.element_size();
  for (int64_t dim = 0; dim < 3; dim++) {
    if (tensor.size(dim) > 1 && (tensor.stride(dim) <= 0 || tensor.stride(dim) % chunk != 0)) return false;
  }
  return true;
}

at::Tensor with_kernel_layout(const at::Tensor& tensor, RowLayout layout) {
  return has_kernel_layout(tensor, layout) ? tensor : tensor.clone(at::MemoryFormat::Contiguous);
}

ResultMemory::ResultMemory(const at::Tensor& result, bool is_writable)
    : result_(result), rows_(is_writable ? result : empty_like_contiguous(result)) {}

void ResultMemory::hand_over() const {
  if (!rows_.is_same(result_)) result_.copy_(rows_);
}

TensorView view_of(const at::Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

AttentionShape shape_of(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value) {
  return {.batch = static_cast<int>(query.size(0)),
          .query_length = static_cast<int>(query.size(1)),
          .key_length = static_cast<int>(key.size(1)),
          .num_heads = static_cast<int>(query.size(2)),
          .num_kv_heads = static_cast<int>(key.size(2)),
          .dim_qk = static_cast<int>(query.size(3)),
          .dim_v = static_cast<int>(value.size(3))};
}

IntegerView integers_of(const std::optional<at::Tensor>& tensor) {
  if (!tensor) return {};
  return {.data = tensor->const_data_ptr(),
          .is_int64 = tensor->scalar_type() == at::kLong,
          .stride_row = tensor->stride(0),
          .stride_column = tensor->dim() > 1 ? tensor->stride(1) : 0};
}

ElementType element_of(const at::Tensor& tensor) {
  if (tensor.scalar_type() == at::kFloat) return ElementType::kFloat;
  return tensor.scalar_type() == at::kBFloat16 ? ElementType::kBFloat16 : ElementType::kHalf;
}

bool allows_tf32() {
  return !at::NoTF32Guard::should_disable_tf32() &&
         at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
             at::Float32Precision::TF32;
}

int sms_left_free() { return std::max(at::globalContext()._SMCarveout_EXPERIMENTAL().value_or(0), 0); }

ScaledQuery with_positive_scale(const at::Tensor& query, double scale) {
  constexpr double kLargest = 1e37;
  const auto magnitude = static_cast<float>(std::min(std::abs(scale), kLargest));
  if (magnitude == 0.f) return {query.mul(0), 1.f, 0};
  if (scale < 0.0) return {query.neg(), magnitude, -1};
  return {query, magnitude, 1};
}

AttentionWindow window_of(bool is_causal, int64_t window_left, int64_t window_right) {
  return {.left = window_side(window_left), .right = is_causal ? 0 : window_side(window_right)};
}

AttentionWindow window_of(const AttentionProblem& problem) {
  if (problem.has_positions()) return {};
  return window_of(problem.is_causal, problem.window_left, problem.window_right);
}

SegmentProblem segment_problem(const AttentionProblem& problem, const TileSizes& tiles, SegmentSide order_of) {
  const at::Tensor &query_ids = *problem.query_segment_ids, &key_ids = *problem.key_segment_ids;
  const AttentionWindow window = window_of(problem);
  SegmentProblem segments{.query_ids = query_ids.const_data_ptr(),
                          .key_ids = key_ids.const_data_ptr(),
                          .ids_are_int64 = query_ids.scalar_type() == at::kLong,
                          .query_stride_batch = query_ids.stride(0),
                          .query_stride_token = query_ids.stride(1),
                          .key_stride_batch = key_ids.stride(0),
                          .key_stride_token = key_ids.stride(1),
                          .batch = static_cast<int>(query_ids.size(0)),
                          .query_length = static_cast<int>(query_ids.size(1)),
                          .key_length = static_cast<int>(key_ids.size(1)),
                          .query_tile = tiles.query,
                          .key_tile = tiles.key,
                          .window_left = window.left,
                          .window_right = window.right,
                          .order_of = order_of};
  if (problem.has_positions()) {
    segments.positions = {.of_queries = problem.query_positions->const_data_ptr<int>(),
                          .of_keys = problem.key_positions->const_data_ptr<int>(),
                          .left = problem.window_left,
                          .right = problem.is_causal ? 0 : problem.window_right};
  }
  return segments;
}

}  // namespace selfattn::cuda
