#include "forward.h"

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

namespace selfattn::cuda {

AttentionResults run_forward(const ForwardCall& call,
                             const std::function<std::optional<SegmentProblem>(const TileSizes&)>& segments_of) {
  const at::Tensor& q = call.query;
  const c10::cuda::CUDAGuard guard(q.device());
  const cudaStream_t stream = at::cuda::getCurrentCUDAStream();
  const RowLayout layout = row_layout(call.shape, static_cast<int>(q.element_size()));
  const FlashKernels& kernels = flash_kernels(element_of(q), layout);
  const ScaledQuery scaled = with_positive_scale(q, call.scale);
  const at::Tensor query = with_kernel_layout(scaled.query, layout), key = with_kernel_layout(call.key, layout),
                   value = with_kernel_layout(call.value, layout);
  const at::Tensor sink_logits = call.sinks ? call.sinks->to(at::kFloat).contiguous() : at::Tensor();
  const at::Tensor out = empty({q.size(0), q.size(1), q.size(2), value.size(3)}, q.scalar_type(), q.device());
  const at::Tensor lse = empty({q.size(0), q.size(2), q.size(1)}, at::kFloat, q.device());

  ForwardParams params{};
  params.shape = call.shape;
  params.window = call.window;
  params.element = element_of(q);
  params.allows_tf32 = params.element == ElementType::kFloat && allows_tf32();
  params.scale = scaled.scale;
  params.softcap = static_cast<float>(call.softcap);
  params.sms_left_free = sms_left_free();
  params.q = view_of(query), params.k = view_of(key), params.v = view_of(value), params.out = view_of(out);
  params.pages = call.pages;
  params.lse = lse.mutable_data_ptr<float>();
  params.sinks = call.sinks ? sink_logits.const_data_ptr<float>() : nullptr;

  const TileSizes tiles = kernels.forward_tiles(params);
  const int64_t query_tiles = (q.size(1) + tiles.query - 1) / tiles.query;
  const int64_t repair_bytes = q.size(0) * q.size(2) * query_tiles * static_cast<int64_t>(sizeof(int));
  const auto scratch = [&](int64_t bytes) {
    const at::Tensor memory = empty({bytes + repair_bytes}, at::kByte, q.device());
    params.repair_list = reinterpret_cast<int*>(static_cast<char*>(memory.mutable_data_ptr()) + bytes);
    return memory;
  };
  at::Tensor storage;
  if (const std::optional<SegmentProblem> segments = segments_of(tiles)) {
    storage = scratch(segment_tables_bytes(*segments));
    params.segments = make_segment_tables(*segments, storage.mutable_data_ptr());
    params.counters = params.segments.counters;
    C10_CUDA_CHECK(launch_prepare_segments(*segments, params.segments, stream));
  } else {
    storage = scratch(kTileCounters * sizeof(int));
    params.counters = static_cast<int*>(storage.mutable_data_ptr());
  }
  C10_CUDA_CHECK(kernels.launch_forward(params, stream));
  return {out, lse};
}

}  // namespace selfattn::cuda
