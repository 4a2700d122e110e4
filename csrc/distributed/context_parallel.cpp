#include "distributed/context_parallel.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <selfattn/context_parallel.h>
#include <torch/library.h>

#include <utility>

#include "distributed/context_parallel_op.h"
#include "distributed/context_part.h"
#include "distributed/shared_part.h"

namespace selfattn {
namespace {

using at::Tensor;

/// Ids of the shared slots of this rank, masked but for split documents.
Tensor own_shared_ids(const ContextProblem& problem) {
  return problem.kv_ids.narrow(1, problem.rank() * problem.shared, problem.shared);
}

AttentionProblem local_part(const ContextProblem& problem) {
  const int64_t begin = problem.local_start, shared = problem.shared, end = problem.own.query.size(1);
  AttentionProblem part = problem.narrow_tokens(begin, end);
  Tensor ids = problem.own.query_segment_ids->narrow(1, begin, end - begin);
  if (begin < shared) {
    ids = ids.clone(at::MemoryFormat::Contiguous);
    const Tensor is_split = own_shared_ids(problem).narrow(1, begin, shared - begin) >= 0;
    ids.narrow(1, 0, shared - begin).masked_fill_(is_split, -1);
  }
  part.query_segment_ids = part.key_segment_ids = ids.contiguous();
  part.query_positions = part.key_positions =
      problem.needs_positions()
          ? OptionalTensor(problem.own.query_positions->narrow(1, begin, end - begin).contiguous())
          : std::nullopt;
  return part;
}

/// The results of both parts for the tokens of this rank, of which at most one is not 0 for a token. May be written
/// over `local`.
Tensor join_parts(const ContextProblem& problem, const Tensor& local, const Tensor& shared) {
  if (!problem.has_local_part()) return shared.contiguous();
  if (!problem.has_shared_part()) return local.contiguous();
  const int64_t begin = problem.local_start, in_both = problem.shared - begin;
  const Tensor joined = begin == 0 ? local.contiguous() : at::cat({shared.narrow(1, 0, begin), local}, 1);
  if (in_both > 0) joined.narrow(1, begin, in_both).add_(shared.narrow(1, begin, in_both));
  return joined;
}

}  // namespace

ContextResults context_parallel_forward(const ContextProblem& problem) {
  SharedTransfers started;
  if (problem.has_shared_part()) started = start_shared_forward(problem);
  const auto options = problem.own.query.options().dtype(at::kFloat);
  const auto no_lse = [&] { return at::empty({problem.own.query.size(0), problem.own.query.size(2), 0}, options); };
  Tensor lse = no_lse(), shared_lse = no_lse();
  Tensor local, shared;
  std::vector<Tensor> exchanged;
  if (problem.has_local_part()) std::tie(local, lse) = attend_part(local_part(problem), problem.backend);
  if (problem.has_shared_part())
    std::tie(shared, shared_lse, exchanged) = finish_shared_forward(problem, std::move(started));
  return {join_parts(problem, local, shared), lse, shared_lse, exchanged};
}

ContextGradients context_parallel_backward(const ContextProblem& problem, const Tensor& grad_out, const Tensor& out,
                                           const Tensor& lse, const Tensor& shared_lse, at::TensorList exchanged) {
  const auto gradients_of = [&](int64_t begin, int64_t end, const Tensor& lse_of_part) {
    return AttentionGradients{.grad_out = grad_out.narrow(1, begin, end - begin),
                              .out = out.narrow(1, begin, end - begin),
                              .lse = lse_of_part};
  };
  const AttentionGradients of_shared = gradients_of(0, problem.shared, shared_lse);
  SharedTransfers started;
  if (problem.has_shared_part()) started = start_shared_backward(problem, of_shared.grad_out, exchanged);
  PartGradients local, shared;
  if (problem.has_local_part()) {
    local = attend_part_backward(local_part(problem), problem.backend,
                                 gradients_of(problem.local_start, grad_out.size(1), lse));
  }
  if (problem.has_shared_part()) shared = finish_shared_backward(problem, std::move(started), of_shared, exchanged);
  Tensor sinks = problem.own.sinks ? at::zeros_like(*problem.own.sinks) : at::empty({0}, problem.own.query.options());
  for (const PartGradients* part : {&local, &shared}) {
    if (part->sinks.defined()) sinks += part->sinks;
  }
  return {join_parts(problem, local.query, shared.query), join_parts(problem, local.key, shared.key),
          join_parts(problem, local.value, shared.value), sinks};
}

namespace {

/// Chooses the method here, where the device is known, as it is not to the operators on meta tensors.
Tensor attend(const ContextCall& call) {
  ContextCall chosen = call;
  if (call.method == "auto") {
    chosen.method = make_context_problem(call).method == ContextMethod::kHeads ? "heads" : "keys";
  }
  return std::get<0>(ContextParallelForward::call(kContextParallelForward, chosen));
}

ContextResults forward(const ContextCall& call) { return context_parallel_forward(make_context_problem(call)); }

ContextGradients backward(const Tensor& grad_out, const Tensor& out, const Tensor& lse, const Tensor& shared_lse,
                          at::TensorList exchanged, const ContextCall& call) {
  const ContextProblem problem = make_context_problem(call);
  check_context_gradients(problem, grad_out, out, lse, shared_lse, exchanged);
  return context_parallel_backward(problem, grad_out, out, lse, shared_lse, exchanged);
}

void register_kernels(torch::Library& m) {
  m.impl("context_parallel_attention_forward", TORCH_FN(ContextParallelForward::from_schema<forward>));
  m.impl("context_parallel_attention_backward", TORCH_FN(ContextParallelBackward::from_schema<backward>));
}

}  // namespace

Tensor context_parallel_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                  const ContextParallelOptions& options) {
  return ContextParallelAttention::call("selfattn::context_parallel_attention",
                                        {.q = q,
                                         .k = k,
                                         .v = v,
                                         .kv_segment_ids = options.kv_segment_ids(),
                                         .kv_positions = options.kv_positions(),
                                         .attention = {.segment_ids = options.segment_ids(),
                                                       .is_causal = options.causal(),
                                                       .qk_scale = options.qk_scale(),
                                                       .window_left = options.window_left(),
                                                       .window_right = options.window_right(),
                                                       .softcap = options.softcap(),
                                                       .sinks = options.sinks(),
                                                       .positions = options.positions()},
                                         .shared = options.shared(),
                                         .group_size = options.group_size(),
                                         .group_name = options.group_name(),
                                         .method = options.method(),
                                         .backend = options.backend(),
                                         .local_start = options.local_start(),
                                         .documents_are_runs = options.documents_are_runs(),
                                         .heads_group_name = options.heads_group_name(),
                                         .heads_group_size = options.heads_group_size(),
                                         .kv_order = options.kv_order()});
}

}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, CompositeImplicitAutograd, m) {
  using namespace selfattn;
  m.impl("context_parallel_attention", TORCH_FN(ContextParallelAttention::from_schema<attend>));
}
TORCH_LIBRARY_IMPL(selfattn, CPU, m) { selfattn::register_kernels(m); }
TORCH_LIBRARY_IMPL(selfattn, CUDA, m) { selfattn::register_kernels(m); }
