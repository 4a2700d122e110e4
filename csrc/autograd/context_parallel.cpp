// Autograd of context_parallel_attention. Its gradient is an operator, so that a traced graph holds two.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "distributed/context_parallel_op.h"

namespace selfattn {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// With a name that other files could see: it is what profilers and grad_fn show.
class ContextParallelNode : public torch::autograd::Function<ContextParallelNode> {
 public:
  /// The tensors that may want a gradient stand beside the call that holds them: that is where apply() looks.
  static variable_list forward(AutogradContext* context, const at::Tensor& /*q*/, const at::Tensor& /*k*/,
                               const at::Tensor& /*v*/, const OptionalTensor& /*sinks*/, const ContextCall& call) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, lse, shared_lse, exchanged] = ContextParallelForward::call(kContextParallelForward, call);
    variable_list results = {out, lse, shared_lse};
    results.insert(results.end(), exchanged.begin(), exchanged.end());
    context->mark_non_differentiable({results.begin() + 1, results.end()});
    variable_list saved = {call.q,
                           call.k,
                           call.v,
                           *call.attention.segment_ids,
                           call.kv_segment_ids,
                           *call.attention.positions,
                           call.kv_positions,
                           as_saved(call.attention.sinks),
                           as_saved(call.kv_order)};
    saved.insert(saved.end(), results.begin(), results.end());
    context->save_for_backward(std::move(saved));
    auto& numbers = context->saved_data;
    numbers["is_causal"] = call.attention.is_causal;
    numbers["qk_scale"] = call.attention.qk_scale;
    numbers["window_left"] = call.attention.window_left;
    numbers["window_right"] = call.attention.window_right;
    numbers["softcap"] = call.attention.softcap;
    numbers["shared"] = call.shared;
    numbers["group_size"] = call.group_size;
    numbers["group_name"] = call.group_name;
    numbers["method"] = call.method;
    numbers["backend"] = call.backend;
    numbers["local_start"] = call.local_start;
    numbers["documents_are_runs"] = call.documents_are_runs;
    numbers["heads_group_name"] = call.heads_group_name;
    numbers["heads_group_size"] = call.heads_group_size;
    context->set_materialize_grads(false);
    return results;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    if (!grads[0].defined()) return variable_list(5);
    const variable_list saved = context->get_saved_variables();
    auto& numbers = context->saved_data;
    const ContextCall call{.q = saved[0],
                           .k = saved[1],
                           .v = saved[2],
                           .kv_segment_ids = saved[4],
                           .kv_positions = saved[6],
                           .attention = {.segment_ids = saved[3],
                                         .is_causal = numbers["is_causal"].toBool(),
                                         .qk_scale = numbers["qk_scale"].toOptional<double>(),
                                         .window_left = numbers["window_left"].toInt(),
                                         .window_right = numbers["window_right"].toInt(),
                                         .softcap = numbers["softcap"].toDouble(),
                                         .sinks = as_optional(saved[7]),
                                         .positions = saved[5]},
                           .shared = numbers["shared"].toInt(),
                           .group_size = numbers["group_size"].toInt(),
                           .group_name = numbers["group_name"].toStringRef(),
                           .method = numbers["method"].toStringRef(),
                           .backend = numbers["backend"].toStringRef(),
                           .local_start = numbers["local_start"].toInt(),
                           .documents_are_runs = numbers["documents_are_runs"].toBool(),
                           .heads_group_name = numbers["heads_group_name"].toStringRef(),
                           .heads_group_size = numbers["heads_group_size"].toInt(),
                           .kv_order = as_optional(saved[8])};
    const auto exchanged = at::TensorList(saved).slice(12);
    const auto [dq, dk, dv, dsinks] = ContextParallelBackward::call(kContextParallelBackward, grads[0], saved[9],
                                                                    saved[10], saved[11], exchanged, call);
    return {dq, dk, dv, call.attention.sinks ? dsinks : at::Tensor(), at::Tensor()};
  }
};

namespace {

ContextResults attend(const ContextCall& call) {
  if (!any_requires_grad({call.q, call.k, call.v, call.attention.sinks})) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return ContextParallelForward::call(kContextParallelForward, call);
  }
  const variable_list results = ContextParallelNode::apply(call.q, call.k, call.v, call.attention.sinks, call);
  return {results[0], results[1], results[2], {results.begin() + 3, results.end()}};
}

ContextGradients attend_backward(const at::Tensor& grad_out, const at::Tensor& out, const at::Tensor& lse,
                                 const at::Tensor& shared_lse, at::TensorList exchanged, const ContextCall& call) {
  check_dense(grad_out, "grad_out"), check_dense(out, "out");
  check_dense(lse, "lse"), check_dense(shared_lse, "shared_lse");
  TORCH_CHECK_NOT_IMPLEMENTED(
      !any_requires_grad({grad_out, out, call.q, call.k, call.v, call.attention.sinks}),
      "selfattn: context_parallel_attention has no gradient of its gradient: grad_out, out, q, k, v and sinks must not "
      "require one (create_graph=True); gather the rows, and call multihead_attention");
  at::AutoDispatchBelowADInplaceOrView guard;
  return ContextParallelBackward::call(kContextParallelBackward, grad_out, out, lse, shared_lse, exchanged, call);
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, Autograd, m) {
  using namespace selfattn;
  m.impl("context_parallel_attention_forward", TORCH_FN(ContextParallelForward::from_schema<attend>));
  m.impl("context_parallel_attention_backward", TORCH_FN(ContextParallelBackward::from_schema<attend_backward>));
}
