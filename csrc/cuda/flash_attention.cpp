// selfattn::flash_attention on CUDA: tensors -> params -> launch.
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "attention/flash_attention_op.h"
#include "binding.h"
#include "ordered_call.h"

namespace selfattn::cuda {
namespace {

/// `problem` with positions: of tokens in order.
AttentionResults attend_rows(const AttentionProblem& problem) {
  const at::Tensor &q = problem.query, &k = problem.key, &v = problem.value;
  const c10::cuda::CUDAGuard guard(q.device());
  const cudaStream_t stream = at::cuda::getCurrentCUDAStream();
  const AttentionShape shape = shape_of(q, k, v);
  const RowLayout layout = row_layout(shape, static_cast<int>(q.element_size()));
  const FlashKernels& kernels = flash_kernels(element_of(q), layout);
  const ScaledQuery scaled = with_positive_scale(q, problem.scale);
  const at::Tensor query = with_kernel_layout(scaled.query, layout), key = with_kernel_layout(k, layout),
                   value = with_kernel_layout(v, layout);
  const at::Tensor sink_logits = problem.sinks ? problem.sinks->to(at::kFloat).contiguous() : at::Tensor();

  ForwardParams params{};
  params.shape = shape;
  const at::Tensor out = empty({q.size(0), q.size(1), q.size(2), v.size(3)}, q.scalar_type(), q.device());
  const at::Tensor lse = empty({q.size(0), q.size(2), q.size(1)}, at::kFloat, q.device());
  params.window = window_of(problem);
  params.element = element_of(q);
  params.allows_tf32 = params.element == ElementType::kFloat && allows_tf32();
  params.scale = scaled.scale;
  params.softcap = static_cast<float>(problem.softcap);
  params.sms_left_free = sms_left_free();
  params.q = view_of(query), params.k = view_of(key), params.v = view_of(value), params.out = view_of(out);
  params.lse = lse.mutable_data_ptr<float>();
  params.sinks = problem.sinks ? sink_logits.const_data_ptr<float>() : nullptr;

  const TileSizes tiles = kernels.forward_tiles(params);
  const int64_t query_tiles = (q.size(1) + tiles.query - 1) / tiles.query;
  const int64_t repair_bytes = q.size(0) * q.size(2) * query_tiles * static_cast<int64_t>(sizeof(int));
  const auto scratch = [&](int64_t bytes) {
    const at::Tensor memory = empty({bytes + repair_bytes}, at::kByte, q.device());
    params.repair_list = reinterpret_cast<int*>(static_cast<char*>(memory.mutable_data_ptr()) + bytes);
    return memory;
  };
  at::Tensor storage;
  if (problem.has_segments()) {
    const SegmentProblem segments = segment_problem(problem, tiles, SegmentSide::kQueries);
    storage = scratch(segment_tables_bytes(segments));
    params.segments = make_segment_tables(segments, storage.mutable_data_ptr());
    params.counters = params.segments.counters;
    C10_CUDA_CHECK(launch_prepare_segments(segments, params.segments, stream));
  } else {
    storage = scratch(kTileCounters * sizeof(int));
    params.counters = static_cast<int*>(storage.mutable_data_ptr());
  }
  C10_CUDA_CHECK(kernels.launch_forward(params, stream));
  return {out, lse};
}

AttentionResults attend(const AttentionProblem& problem) {
  if (!problem.has_positions()) return attend_rows(problem);
  const OrderedCall call(problem);
  return call.as_called(attend_rows(call.problem()));
}

}  // namespace
}  // namespace selfattn::cuda

TORCH_LIBRARY_IMPL(selfattn, CUDA, m) {
  using namespace selfattn;
  m.impl("flash_attention", TORCH_FN(flash_attention_from_schema<checked<selfattn::cuda::attend>>));
}
