// flash_attention_kv_cache on CPU: tensors -> plan -> tasks on threads.
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include "cpu/for_each_task.h"
#include "cpu/kv_cache_plan.h"
#include "cpu/select_kernels.h"
#include "cpu/token_view.h"
#include "kv_cache/attention_op.h"

namespace selfattn {
namespace {

using namespace cpu;

CacheView cache_view_of(const at::Tensor& cache) {
  return {cache.const_data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2)};
}

AttentionResults attend(const KvCacheProblem& call) {
  const auto [out, lse] = empty_kv_cache_results(call);
  if (lse.numel() == 0) return {out, lse};
  KvCachePlan plan = plan_kv_cache(call);
  plan.make_tiles(call, std::numeric_limits<int64_t>::max(), at::get_num_threads());

  const at::Tensor query = with_contiguous_rows(call.query);
  const at::Tensor key = with_contiguous_rows(call.key), value = with_contiguous_rows(call.value);
  const at::Tensor sinks = call.sinks ? call.sinks->to(at::kFloat).contiguous() : at::Tensor();
  const KvCacheKernels& kernels = select_kv_cache_kernels(query.scalar_type());
  KvCacheKernelProblem problem{.query_heads = query.size(2),
                               .key_heads = key.size(2),
                               .head_dim = query.size(3),
                               .value_dim = value.size(3),
                               .page_size = key.size(1),
                               .scale = call.scale,
                               .softcap = call.softcap,
                               .query = view_of(query),
                               .out = view_of(out),
                               .lse = lse.mutable_data_ptr<float>(),
                               .query_length = query.size(1),
                               .key = cache_view_of(key),
                               .value = cache_view_of(value),
                               .sinks = sinks.defined() ? sinks.const_data_ptr<float>() : nullptr,
                               .queries = plan.queries.data(),
                               .tiles = plan.tiles.data(),
                               .tile_count = static_cast<int64_t>(plan.tiles.size()),
                               .tile_rows = plan.tile_rows,
                               .chunk_keys = plan.chunk_keys,
                               .heads_per_task = plan.heads_per_task};
  if (plan.pages.defined()) {
    problem.page_table = plan.pages.const_data_ptr<int64_t>();
    problem.pages_per_row = plan.pages.size(1);
  }
  at::DataPtr parts;
  std::vector<std::atomic<int32_t>> arrivals;
  if (plan.has_parts) {
    parts = c10::GetCPUAllocator()->allocate(plan.tasks * kernels.part_floats(problem) *
                                             static_cast<int64_t>(sizeof(float)));
    problem.parts = static_cast<float*>(parts.get());
    arrivals = std::vector<std::atomic<int32_t>>(plan.tasks);
    problem.arrivals = arrivals.data();
  }
  for_each_task(
      plan.tasks, kernels.workspace_bytes(problem),
      [&](int64_t task, void* workspace) { kernels.attend(problem, task, workspace); }, [] {});
  return {out, lse};
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, CPU, m) {
  using namespace selfattn;
  m.impl("flash_attention_kv_cache", TORCH_FN(flash_kv_cache_from_schema<checked<attend>>));
}
