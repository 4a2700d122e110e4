#pragma once

#include <string>
#include <type_traits>

#include "attention/constraint.h"
#include "attention/flash_attention_op.h"
#include "common/dispatch.h"
#include "kv_cache/problem.h"

// attention_with_kv_cache, attention_with_kv_cache_lse and explain_kv_cache_backend, whose schemas differ in their
// result alone, and flash_attention_kv_cache: the only place in C++ where their arguments are listed.

namespace selfattn {

using KvCacheBackend = BackendFor<KvCacheProblem>;

// One a file in csrc/backend/.
const KvCacheBackend& flash_kv_cache_backend();
const KvCacheBackend& cudnn_kv_cache_backend();
const KvCacheBackend& aten_kv_cache_backend();
const KvCacheBackend& reference_kv_cache_backend();

const KvCacheBackend& find_backend(Backend name, const KvCacheProblem& problem);

/// An implementation of a public operator, as a function that can be registered. Validates the call.
template <typename Result, Result (*kImplementation)(const KvCacheProblem&, Backend)>
Result kv_cache_from_schema(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                            const at::Tensor& lengths, const OptionalTensor& page_table,
                            const OptionalTensor& segment_ids, bool causal, std::optional<double> qk_scale,
                            c10::string_view backend, const OptionalTensor& positions, int64_t window_left,
                            int64_t window_right, double softcap, const OptionalTensor& sinks,
                            const OptionalTensor& draft_mask, const OptionalTensor& k_scale,
                            const OptionalTensor& v_scale, int64_t split_keys) {
  constexpr bool kNeedsLse = !std::is_same_v<Result, at::Tensor> && !std::is_same_v<Result, std::string>;
  const Backend name = parse_backend(backend);
  return kImplementation(make_kv_cache_problem(q, k_cache, v_cache, lengths,
                                               {page_table, segment_ids, causal, qk_scale, positions, window_left,
                                                window_right, softcap, sinks, draft_mask, k_scale, v_scale, split_keys},
                                               kNeedsLse),
                         name);
}

/// The one of the three operators that gives a Result, through the dispatcher.
template <typename Result>
Result call_kv_cache(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                     const at::Tensor& lengths, const KvCacheArguments& arguments, c10::string_view backend) {
  static const auto op = find_op<decltype(kv_cache_from_schema<Result, nullptr>)>(
      std::is_same_v<Result, at::Tensor>    ? "selfattn::attention_with_kv_cache"
      : std::is_same_v<Result, std::string> ? "selfattn::explain_kv_cache_backend"
                                            : "selfattn::attention_with_kv_cache_lse");
  return op.call(q, k_cache, v_cache, lengths, arguments.page_table, arguments.segment_ids, arguments.is_causal,
                 arguments.qk_scale, backend, arguments.positions, arguments.window_left, arguments.window_right,
                 arguments.softcap, arguments.sinks, arguments.draft_mask, arguments.k_scale, arguments.v_scale,
                 arguments.split_keys);
}

/// flash_attention_kv_cache: what a device registers is flash_kv_cache_from_schema<checked<kernel>>.
template <AttentionResults (*kImplementation)(const KvCacheProblem&)>
AttentionResults flash_kv_cache_from_schema(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                                            const at::Tensor& lengths, const OptionalTensor& page_table,
                                            const OptionalTensor& segment_ids, bool causal,
                                            std::optional<double> qk_scale, const OptionalTensor& positions,
                                            int64_t window_left, int64_t window_right, double softcap,
                                            const OptionalTensor& sinks, const OptionalTensor& draft_mask,
                                            const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                                            int64_t split_keys) {
  return kImplementation(make_kv_cache_problem(q, k_cache, v_cache, lengths,
                                               {page_table, segment_ids, causal, qk_scale, positions, window_left,
                                                window_right, softcap, sinks, draft_mask, k_scale, v_scale, split_keys},
                                               /*needs_lse=*/true));
}

/// Through the dispatcher.
inline AttentionResults flash_attention_kv_cache(const KvCacheProblem& problem) {
  static const auto op = find_op<decltype(flash_kv_cache_from_schema<nullptr>)>("selfattn::flash_attention_kv_cache");
  return op.call(problem.query, problem.key, problem.value, problem.lengths, problem.page_table, problem.segment_ids,
                 problem.is_causal, problem.scale, problem.positions, problem.window_left, problem.window_right,
                 problem.softcap, problem.sinks, problem.draft_mask, /*k_scale=*/std::nullopt,
                 /*v_scale=*/std::nullopt, problem.split_keys);
}

/// Contiguous results, not filled: out (B, Sq, NH, DV) in q's dtype; lse (B, NH, Sq) float32.
AttentionResults empty_kv_cache_results(const KvCacheProblem& problem);

/// What a kernel needs beyond a valid call: for `checked` of attention/flash_attention_op.h. Throws
/// c10::NotImplementedError with every reason of the flash backend's constraints.
void check_kernel_call(const KvCacheProblem& problem);

}  // namespace selfattn
