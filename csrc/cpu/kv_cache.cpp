// flash_attention_kv_cache on CPU: tensors -> plan -> tasks on threads.
#include <ATen/TensorIndexing.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include "cpu/flash_attention.h"
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

// Query rows of a run from which on its keys are worth packing.
constexpr int64_t kLongRun = 32;

/// Whether long runs may go through flash_attention, whose positions end at the last key and whose splits depend on the
/// threads.
bool packs_long_runs(const KvCacheProblem& call) { return !call.positions && !call.draft_mask && call.split_keys == 0; }

/// The keys or values [first, end) of a cache row, (1, tokens, NKV, D): a view where one page holds them, else a copy.
at::Tensor tokens_of(const at::Tensor& cache, const at::Tensor& pages, int64_t row, int64_t first, int64_t end) {
  const int64_t page_size = cache.size(1), first_page = first / page_size, pages_end = (end - 1) / page_size + 1;
  const at::Tensor paged = !pages.defined() ? cache.narrow(0, row, 1)
                           : pages_end - first_page == 1
                               ? cache.narrow(0, pages[row][first_page].item<int64_t>(), 1)
                               : cache.index_select(0, pages[row].slice(0, first_page, pages_end));
  return paged.flatten(0, 1).slice(0, first - first_page * page_size, end - first_page * page_size).unsqueeze(0);
}

/// A run by flash_attention, into its tokens of out and lse.
void attend_packed(const KvCacheProblem& call, const KvCachePlan& plan, const CacheRun& run, const at::Tensor& out,
                   const at::Tensor& lse) {
  const CacheQuery* const queries = &plan.queries[run.first_query];
  at::Tensor batch = at::empty({run.queries}, at::kLong), token = at::empty({run.queries}, at::kLong);
  for (int64_t i = 0; i < run.queries; ++i) {
    batch.mutable_data_ptr<int64_t>()[i] = queries[i].batch, token.mutable_data_ptr<int64_t>()[i] = queries[i].token;
  }
  const int64_t first = queries[0].first_key;  // the window's, of the query that is furthest left
  const auto [run_out, run_lse] =
      cpu::attend({.query = call.query.index({batch, token}).unsqueeze(0),
                   .key = tokens_of(call.key, plan.pages, run.cache_row, first, run.length),
                   .value = tokens_of(call.value, plan.pages, run.cache_row, first, run.length),
                   .sinks = call.sinks,
                   .is_causal = call.is_causal,
                   .scale = call.scale,
                   .window_left = call.window_left,
                   .window_right = call.window_right,
                   .softcap = call.softcap,
                   .needs_lse = true});
  at::Tensor(out).index_put_({batch, token}, run_out[0]);
  lse.transpose(1, 2).index_put_({batch, token}, run_lse[0].t());
}

AttentionResults attend_cache(const KvCacheProblem& call) {
  const auto [out, lse] = empty_kv_cache_results(call);
  if (lse.numel() == 0) return {out, lse};
  KvCachePlan plan = plan_kv_cache(call);
  if (packs_long_runs(call)) {
    for (const CacheRun& run : plan.take_long_runs(call, kLongRun)) attend_packed(call, plan, run, out, lse);
  }
  plan.make_tiles(call, at::get_num_threads());
  if (plan.tasks == 0) return {out, lse};

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
  m.impl("flash_attention_kv_cache", TORCH_FN(flash_kv_cache_from_schema<checked<attend_cache>>));
}
