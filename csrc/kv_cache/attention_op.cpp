// The public operators over a KV cache: choose a backend, call it.
#include "kv_cache/attention_op.h"

#include <ATen/ops/empty.h>
#include <c10/util/StringUtil.h>
#include <torch/library.h>

#include "attention/select_backend.h"

namespace selfattn {

const KvCacheBackend& find_backend(Backend name, const KvCacheProblem&) {
  static const KvCacheBackend* const backends[] = {&flash_kv_cache_backend(), &cudnn_kv_cache_backend(),
                                                   &aten_kv_cache_backend(), &reference_kv_cache_backend()};
  return find_by_name<KvCacheProblem>(name, backends);
}

AttentionResults empty_kv_cache_results(const KvCacheProblem& problem) {
  const auto options = problem.query.options();
  return {
      at::empty_symint({problem.batch(), problem.query_length(), problem.query_heads(), problem.value_head_dim()},
                       options),
      at::empty_symint({problem.batch(), problem.query_heads(), problem.query_length()}, options.dtype(at::kFloat))};
}

void check_kernel_call(const KvCacheProblem& problem) {
  const auto reasons = reasons_against(flash_kv_cache_backend(), problem);
  TORCH_CHECK_NOT_IMPLEMENTED(reasons.empty(),
                              "selfattn: flash_attention_kv_cache cannot serve this call: ", c10::Join("; ", reasons));
}

namespace {

at::Tensor attend(const KvCacheProblem& problem, Backend name) {
  return std::get<0>(select_backend(name, problem).call(problem));
}

AttentionResults attend_lse(const KvCacheProblem& problem, Backend name) {
  return select_backend(name, problem).call(problem);
}

std::string explain(const KvCacheProblem& problem, Backend name) { return explain_selection(name, problem); }

/// Of a device without kernels: the check before it has said so.
AttentionResults refuse_device(const KvCacheProblem&) {
  TORCH_INTERNAL_ASSERT(false, "a device without kernels serves nothing");
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, CompositeImplicitAutograd, m) {
  using namespace selfattn;
  m.impl("attention_with_kv_cache", TORCH_FN((kv_cache_from_schema<at::Tensor, attend>)));
  m.impl("attention_with_kv_cache_lse", TORCH_FN((kv_cache_from_schema<AttentionResults, attend_lse>)));
  m.impl("explain_kv_cache_backend", TORCH_FN((kv_cache_from_schema<std::string, explain>)));
}
TORCH_LIBRARY_IMPL(selfattn, CompositeExplicitAutograd, m) {
  using namespace selfattn;
  m.impl("flash_attention_kv_cache", TORCH_FN(flash_kv_cache_from_schema<checked<refuse_device>>));
}
