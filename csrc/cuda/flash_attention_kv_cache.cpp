// selfattn::flash_attention_kv_cache on CUDA: tensors -> params -> launch.
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "binding.h"
#include "flash/kv_cache/params.h"
#include "kv_cache/attention_op.h"

namespace selfattn::cuda {
namespace {

AttentionResults attend(const KvCacheProblem& problem) {
  const at::Tensor &q = problem.query, &k = problem.key, &v = problem.value;
  const c10::cuda::CUDAGuard guard(q.device());
  const cudaStream_t stream = at::cuda::getCurrentCUDAStream();
  const ScaledQuery scaled = with_positive_scale(q, problem.scale);
  const at::Tensor query = with_kernel_layout(scaled.query, RowLayout::kAligned);
  const OptionalTensor sinks =
      problem.sinks ? OptionalTensor(problem.sinks->to(at::kFloat).contiguous()) : std::nullopt;
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
  params.sinks = sinks ? sinks->const_data_ptr<float>() : nullptr;
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

}  // namespace
}  // namespace selfattn::cuda

TORCH_LIBRARY_IMPL(selfattn, CUDA, m) {
  using namespace selfattn;
  m.impl("flash_attention_kv_cache", TORCH_FN(flash_kv_cache_from_schema<checked<selfattn::cuda::attend>>));
}
