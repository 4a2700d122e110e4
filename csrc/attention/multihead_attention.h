#pragma once

#include <selfattn/ops.h>

#include <string>
#include <type_traits>

#include "attention/problem.h"
#include "common/dispatch.h"

// multihead_attention, multihead_attention_lse and explain_backend, whose schemas differ in their result alone: the
// only place in C++ where their arguments are listed.

namespace selfattn {

/// An implementation, as a function that can be registered. Nothing is validated yet.
template <typename Result, Result (*kImplementation)(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                     const AttentionArguments&, c10::string_view)>
Result multihead_from_schema(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const OptionalTensor& segment_ids, bool causal, std::optional<double> qk_scale,
                             c10::string_view backend, const OptionalTensor& kv_segment_ids, int64_t window_left,
                             int64_t window_right, double softcap, const OptionalTensor& sinks,
                             const OptionalTensor& positions, const OptionalTensor& kv_positions) {
  return kImplementation(q, k, v,
                         {segment_ids, causal, qk_scale, kv_segment_ids, window_left, window_right, softcap, sinks,
                          positions, kv_positions},
                         backend);
}

/// The one of the three operators that gives a Result, through the dispatcher.
template <typename Result>
Result call_multihead(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                      const AttentionArguments& arguments, c10::string_view backend) {
  static const auto op = find_op<decltype(multihead_from_schema<Result, nullptr>)>(
      std::is_same_v<Result, at::Tensor>    ? "selfattn::multihead_attention"
      : std::is_same_v<Result, std::string> ? "selfattn::explain_backend"
                                            : "selfattn::multihead_attention_lse");
  return op.call(q, k, v, arguments.segment_ids, arguments.is_causal, arguments.qk_scale, backend,
                 arguments.kv_segment_ids, arguments.window_left, arguments.window_right, arguments.softcap,
                 arguments.sinks, arguments.positions, arguments.kv_positions);
}

template <typename Result>
Result call_multihead(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionOptions& options) {
  return call_multihead<Result>(
      q, k, v,
      {options.segment_ids(), options.causal(), options.qk_scale(), options.kv_segment_ids(), options.window_left(),
       options.window_right(), options.softcap(), options.sinks(), options.positions(), options.kv_positions()},
      options.backend());
}

}  // namespace selfattn
