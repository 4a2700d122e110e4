// selfattn::flash_attention_kv_cache on CUDA: tensors -> params -> launch.
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "binding.h"
#include "flash/kv_cache/params.h"
#include "forward.h"
#include "kv_cache/attention_op.h"

namespace selfattn::cuda {
namespace {

int64_t capacity_of(const KvCacheProblem& problem) {
  return problem.key.size(1) * (problem.page_table ? problem.page_table->size(1) : 1);
}

AttentionShape shape_of_rows(const KvCacheProblem& problem) {
  AttentionShape shape = shape_of(problem.query, problem.key, problem.value);
  shape.key_length = static_cast<int>(capacity_of(problem));
  return shape;
}

/// Whether the forward kernel of the current device serves the call, and sooner than the kernel for few queries. Of
/// shapes and layouts alone.
bool takes_forward_kernel(const KvCacheProblem& problem) {
  const at::Tensor& q = problem.query;
  if (problem.segment_ids || problem.positions || problem.draft_mask || problem.split_keys) return false;
  constexpr int64_t kLeastQueries = 64;
  if (q.size(1) < kLeastQueries || q.size(1) > kMaxSegmentLength) return false;
  if (const int64_t capacity = capacity_of(problem); capacity == 0 || capacity > kMaxCacheCapacity) return false;
  for (const at::Tensor* cache : {&problem.key, &problem.value})
    if (!has_kernel_layout(*cache, RowLayout::kAligned)) return false;
  const FlashKernels& kernels = flash_kernels(element_of(q), RowLayout::kAligned);
  if (problem.page_table && !kernels.reads_pages) return false;
  // It has the several times higher speed, but takes whole tiles of a head, and never two thread blocks for one tile:
  // of the rows that the device has room for, in as many waves as it takes, enough must be in use
  // (docs/kernels/decode.md).
  constexpr int64_t kSpeed = 3;
  ForwardParams params{};
  params.shape = shape_of_rows(problem), params.softcap = static_cast<float>(problem.softcap);
  const int64_t tile = kernels.forward_tiles(params).query, heads = q.size(0) * q.size(2);
  const int64_t tiles = heads * ((q.size(1) + tile - 1) / tile);
  const int64_t sms = at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
  return (tiles + sms - 1) / sms * sms * tile <= kSpeed * heads * q.size(1);
}

/// A chunk of queries of each row by the forward kernel, to which a row is a batch row with all slots as keys, and
/// lengths and windows are intervals of them.
AttentionResults attend_chunks(const KvCacheProblem& problem) {
  const at::Tensor& k = problem.key;
  const AttentionWindow window = window_of(problem.is_causal, problem.window_left, problem.window_right);
  ForwardCall call{.query = problem.query,
                   .key = k,
                   .value = problem.value,
                   .sinks = problem.sinks,
                   .scale = problem.scale,
                   .softcap = problem.softcap,
                   .shape = shape_of_rows(problem),
                   .window = {}};
  if (problem.page_table) {
    call.pages = {.table = integers_of(problem.page_table),
                  .pages_per_row = static_cast<int>(problem.page_table->size(1)),
                  .size = static_cast<int>(k.size(1)),
                  .count = static_cast<int>(k.size(0))};
  }
  return run_forward(call, [&](const TileSizes& tiles) {
    SegmentProblem segments{};
    segments.batch = call.shape.batch;
    segments.query_length = call.shape.query_length, segments.key_length = call.shape.key_length;
    segments.query_tile = tiles.query, segments.key_tile = tiles.key;
    segments.window_left = segments.window_right = AttentionWindow::kUnbounded;
    segments.order_of = SegmentSide::kQueries;
    segments.cache = {.lengths = integers_of(problem.lengths),
                      .page_table = call.pages.table,
                      .page_size = call.pages.size,
                      .pages = call.pages.count,
                      .window_left = window.left,
                      .window_right = window.right};
    return segments;
  });
}

/// (NH,) contiguous, in a type that the kernel for few queries reads.
OptionalTensor readable_sinks(const OptionalTensor& sinks) {
  if (!sinks) return sinks;
  return (sinks->scalar_type() == at::kDouble ? sinks->to(at::kFloat) : *sinks).contiguous();
}

/// Few queries of each row, or any that ids, positions or a draft mask name.
AttentionResults attend_rows(const KvCacheProblem& problem) {
  const at::Tensor &q = problem.query, &k = problem.key, &v = problem.value;
  const cudaStream_t stream = at::cuda::getCurrentCUDAStream();
  const ScaledQuery scaled = with_positive_scale(q, problem.scale);
  const at::Tensor query = with_kernel_layout(scaled.query, RowLayout::kAligned);
  const OptionalTensor sinks = readable_sinks(problem.sinks);
  const OptionalTensor draft_mask =
      problem.draft_mask ? OptionalTensor(problem.draft_mask->contiguous()) : std::nullopt;
  const at::Tensor out = empty({q.size(0), q.size(1), q.size(2), v.size(3)}, q.scalar_type(), q.device());
  const at::Tensor lse = empty({q.size(0), q.size(2), q.size(1)}, at::kFloat, q.device());

  KvCacheParams params{};
  params.batch = static_cast<int>(q.size(0)), params.queries = static_cast<int>(q.size(1));
  params.rows = static_cast<int>(problem.lengths.size(0));
  params.pages = static_cast<int>(k.size(0)), params.page_size = static_cast<int>(k.size(1));
  params.pages_per_row = problem.page_table ? static_cast<int>(problem.page_table->size(1)) : 1;
  params.num_heads = static_cast<int>(q.size(2)), params.num_kv_heads = static_cast<int>(k.size(2));
  params.dim_qk = static_cast<int>(q.size(3)), params.dim_v = static_cast<int>(v.size(3));
  params.window = window_of(/*is_causal=*/false, problem.window_left, problem.window_right);
  params.is_causal = problem.is_causal;
  params.element = element_of(q);
  params.scale = scaled.scale, params.softcap = static_cast<float>(problem.softcap);
  params.split_keys = problem.split_keys;
  params.q = view_of(query), params.k = view_of(k), params.v = view_of(v);
  params.out = out.mutable_data_ptr(), params.lse = lse.mutable_data_ptr<float>();
  if (sinks) params.sinks = sinks->const_data_ptr(), params.sink_type = element_of(*sinks);
  params.lengths = integers_of(problem.lengths);
  params.page_table = integers_of(problem.page_table);
  params.segment_ids = integers_of(problem.segment_ids);
  params.positions = integers_of(problem.positions);
  params.draft_mask = draft_mask ? draft_mask->const_data_ptr<bool>() : nullptr;
  const at::Tensor workspace = empty({kv_cache_workspace_bytes(params)}, at::kByte, q.device());
  params.workspace = workspace.mutable_data_ptr();
  C10_CUDA_CHECK(launch_attend_kv_cache(params, stream));
  return {out, lse};
}

AttentionResults attend(const KvCacheProblem& problem) {
  const c10::cuda::CUDAGuard guard(problem.query.device());
  return takes_forward_kernel(problem) ? attend_chunks(problem) : attend_rows(problem);
}

}  // namespace
}  // namespace selfattn::cuda

TORCH_LIBRARY_IMPL(selfattn, CUDA, m) {
  using namespace selfattn;
  m.impl("flash_attention_kv_cache", TORCH_FN(flash_kv_cache_from_schema<checked<selfattn::cuda::attend>>));
}
