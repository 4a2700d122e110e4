// Shapes and dtypes of context parallel attention, for tracing: nothing of the group is looked up.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "distributed/context_parallel_op.h"

namespace selfattn {
namespace {

ContextResults forward(const ContextCall& call) {
  return empty_context_results(make_context_problem(call), call.q.device());
}

ContextGradients backward(const at::Tensor& grad_out, const at::Tensor& out, const at::Tensor& lse,
                          const at::Tensor& shared_lse, at::TensorList exchanged, const ContextCall& call) {
  const ContextProblem problem = make_context_problem(call);
  check_context_gradients(problem, grad_out, out, lse, shared_lse, exchanged);
  const auto empty_like = [](const at::Tensor& tensor) {
    return at::empty_symint(tensor.sym_sizes(), tensor.options());
  };
  const OptionalTensor& sinks = problem.own.sinks;
  return {empty_like(call.q), empty_like(call.k), empty_like(call.v),
          sinks ? empty_like(*sinks) : at::empty({0}, call.q.options())};
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, Meta, m) {
  using namespace selfattn;
  m.impl("context_parallel_attention_forward", TORCH_FN(ContextParallelForward::from_schema<forward>));
  m.impl("context_parallel_attention_backward", TORCH_FN(ContextParallelBackward::from_schema<backward>));
}
