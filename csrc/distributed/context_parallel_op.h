#pragma once

#include "common/dense_tensor.h"
#include "common/dispatch.h"
#include "distributed/context_problem.h"

// The operators context_parallel_attention, its forward pass and its gradient, for those who implement them and for
// those who call them: the only place in C++ where their arguments are listed.

namespace selfattn {

/// `Leading`: what stands before q in a schema.
template <typename Result, typename... Leading>
struct ContextParallelOp {
  /// An implementation, as a function that can be registered. Only that tensors are dense is checked yet.
  template <Result (*kImplementation)(Leading..., const ContextCall&)>
  static Result from_schema(Leading... leading, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const at::Tensor& segment_ids, const at::Tensor& kv_segment_ids,
                            const at::Tensor& positions, const at::Tensor& kv_positions, int64_t shared,
                            int64_t group_size, c10::string_view group_name, c10::string_view method, bool causal,
                            std::optional<double> qk_scale, c10::string_view backend, int64_t window_left,
                            int64_t window_right, double softcap, const OptionalTensor& sinks, int64_t local_start,
                            bool documents_are_runs, c10::string_view heads_group_name, int64_t heads_group_size,
                            const OptionalTensor& kv_order) {
    check_dense(q, "q"), check_dense(k, "k"), check_dense(v, "v");
    check_dense(segment_ids, "segment_ids"), check_dense(kv_segment_ids, "kv_segment_ids");
    check_dense(positions, "positions"), check_dense(kv_positions, "kv_positions"), check_dense(sinks, "sinks");
    check_dense(kv_order, "kv_order");
    return kImplementation(leading..., {.q = q,
                                        .k = k,
                                        .v = v,
                                        .kv_segment_ids = kv_segment_ids,
                                        .kv_positions = kv_positions,
                                        .attention = {.segment_ids = segment_ids,
                                                      .is_causal = causal,
                                                      .qk_scale = qk_scale,
                                                      .window_left = window_left,
                                                      .window_right = window_right,
                                                      .softcap = softcap,
                                                      .sinks = sinks,
                                                      .positions = positions},
                                        .shared = shared,
                                        .group_size = group_size,
                                        .group_name = std::string(group_name),
                                        .method = std::string(method),
                                        .backend = std::string(backend),
                                        .local_start = local_start,
                                        .documents_are_runs = documents_are_runs,
                                        .heads_group_name = std::string(heads_group_name),
                                        .heads_group_size = heads_group_size,
                                        .kv_order = kv_order});
  }

  /// Through the dispatcher.
  static Result call(const char* name, Leading... leading, const ContextCall& call) {
    const auto op = find_op<decltype(from_schema<nullptr>)>(name);
    return op.call(leading..., call.q, call.k, call.v, *call.attention.segment_ids, call.kv_segment_ids,
                   *call.attention.positions, call.kv_positions, call.shared, call.group_size, call.group_name,
                   call.method, call.attention.is_causal, call.attention.qk_scale, call.backend,
                   call.attention.window_left, call.attention.window_right, call.attention.softcap,
                   call.attention.sinks, call.local_start, call.documents_are_runs, call.heads_group_name,
                   call.heads_group_size, call.kv_order);
  }
};

using ContextParallelAttention = ContextParallelOp<at::Tensor>;
using ContextParallelForward = ContextParallelOp<ContextResults>;
/// Before q: grad_out, out, lse, shared_lse, exchanged.
using ContextParallelBackward = ContextParallelOp<ContextGradients, const at::Tensor&, const at::Tensor&,
                                                  const at::Tensor&, const at::Tensor&, at::TensorList>;

constexpr const char* kContextParallelForward = "selfattn::context_parallel_attention_forward";
constexpr const char* kContextParallelBackward = "selfattn::context_parallel_attention_backward";

}  // namespace selfattn
