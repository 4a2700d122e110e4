// selfattn::flash_attention on CUDA: tensors -> params -> launch.
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "attention/kernel_ops.h"
#include "flash/params.h"

namespace selfattn::cuda {
namespace {

constexpr int64_t kChunkElements = 8;  // 16 bytes, the copy engine's unit

// What the copy engine takes as it is: a contiguous last dimension, everything else in steps of 16 bytes.
bool has_kernel_layout(const at::Tensor& tensor) {
  if (tensor.stride(3) != 1 || reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 != 0) return false;
  for (int64_t dim = 0; dim < 3; dim++) {
    if (tensor.size(dim) > 1 && (tensor.stride(dim) <= 0 || tensor.stride(dim) % kChunkElements != 0)) return false;
  }
  return true;
}

at::Tensor with_kernel_layout(const at::Tensor& tensor) {
  return has_kernel_layout(tensor) ? tensor : tensor.clone(at::MemoryFormat::Contiguous);
}

TensorView view_of(const at::Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

int window_side(int64_t size) {
  return size < 0 || size > AttentionWindow::kUnbounded ? AttentionWindow::kUnbounded : static_cast<int>(size);
}

SegmentProblem segment_problem(const AttentionProblem& problem, const ForwardParams& params) {
  const at::Tensor &query_ids = *problem.query_segment_ids, &key_ids = *problem.key_segment_ids;
  const TileSizes tiles = flash_attention_forward_tiles(params.shape);
  return {.query_ids = query_ids.const_data_ptr(),
          .key_ids = key_ids.const_data_ptr(),
          .ids_are_int64 = query_ids.scalar_type() == at::kLong,
          .query_stride_batch = query_ids.stride(0),
          .query_stride_token = query_ids.stride(1),
          .key_stride_batch = key_ids.stride(0),
          .key_stride_token = key_ids.stride(1),
          .batch = params.shape.batch,
          .query_length = params.shape.query_length,
          .key_length = params.shape.key_length,
          .query_tile = tiles.query,
          .key_tile = tiles.key,
          .window_left = params.window.left,
          .window_right = params.window.right,
          .order_of = SegmentSide::kQueries};
}

std::tuple<at::Tensor, at::Tensor> flash_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                   const OptionalTensor& segment_ids, bool causal,
                                                   std::optional<double> qk_scale, const OptionalTensor& kv_segment_ids,
                                                   int64_t window_left, int64_t window_right, double softcap,
                                                   const OptionalTensor& sinks) {
  const AttentionProblem problem = make_flash_problem(
      q, k, v, {segment_ids, causal, qk_scale, kv_segment_ids, window_left, window_right, softcap, sinks});
  const c10::cuda::CUDAGuard guard(q.device());
  const cudaStream_t stream = at::cuda::getCurrentCUDAStream();
  const at::Tensor query = with_kernel_layout(q), key = with_kernel_layout(k), value = with_kernel_layout(v);
  const at::Tensor sink_logits = problem.sinks ? problem.sinks->to(at::kFloat).contiguous() : at::Tensor();

  ForwardParams params{};
  params.shape = {.batch = static_cast<int>(q.size(0)),
                  .query_length = static_cast<int>(q.size(1)),
                  .key_length = static_cast<int>(k.size(1)),
                  .num_heads = static_cast<int>(q.size(2)),
                  .num_kv_heads = static_cast<int>(k.size(2)),
                  .dim_qk = static_cast<int>(q.size(3)),
                  .dim_v = static_cast<int>(v.size(3))};
  const at::Tensor out = at::empty({q.size(0), q.size(1), q.size(2), v.size(3)}, q.options());
  const at::Tensor lse = at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(at::kFloat));
  params.window = {.left = window_side(problem.window_left),
                   .right = problem.is_causal ? 0 : window_side(problem.window_right)};
  params.element = q.scalar_type() == at::kBFloat16 ? ElementType::kBFloat16 : ElementType::kHalf;
  params.scale = static_cast<float>(problem.scale);
  params.q = view_of(query), params.k = view_of(key), params.v = view_of(value), params.out = view_of(out);
  params.lse = lse.mutable_data_ptr<float>();
  params.sinks = problem.sinks ? sink_logits.const_data_ptr<float>() : nullptr;

  const auto scratch = [&](int64_t bytes) { return at::empty({bytes}, q.options().dtype(at::kByte)); };
  at::Tensor storage;
  if (problem.has_segments()) {
    const SegmentProblem segments = segment_problem(problem, params);
    storage = scratch(segment_tables_bytes(segments));
    params.segments = make_segment_tables(segments, storage.mutable_data_ptr());
    params.counters = params.segments.counters;
    C10_CUDA_CHECK(launch_prepare_segments(segments, params.segments, stream));
  } else {
    storage = scratch(kTileCounters * sizeof(int));
    params.counters = static_cast<int*>(storage.mutable_data_ptr());
  }
  C10_CUDA_CHECK(launch_flash_attention_forward(params, stream));
  return {out, lse};
}

}  // namespace
}  // namespace selfattn::cuda

TORCH_LIBRARY_IMPL(selfattn, CUDA, m) { m.impl("flash_attention", TORCH_FN(selfattn::cuda::flash_attention)); }
