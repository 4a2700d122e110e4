// vmap of flash_attention and of its gradient: the map becomes part of the batch.
#include <torch/library.h>

#include "attention/flash_attention_op.h"
#include "backend/reference.h"
#include "functorch/vmap.h"

namespace selfattn {
namespace {

/// The problem of every element of the map as one; its sinks, which have no batch, are left as they are.
AttentionProblem fold_problem(const Vmap& vmap, const AttentionProblem& problem) {
  AttentionProblem folded = problem;
  folded.query = vmap.fold(problem.query);
  folded.key = vmap.fold(problem.key);
  folded.value = vmap.fold(problem.value);
  const auto fold_pair = [&](OptionalTensor& of_queries, OptionalTensor& of_keys) {  // one tensor stays one
    if (!of_queries) return;
    const bool are_alike = of_keys->is_same(*of_queries);
    of_queries = vmap.fold(of_queries);
    of_keys = are_alike ? of_queries : vmap.fold(of_keys);
  };
  fold_pair(folded.query_segment_ids, folded.key_segment_ids);
  fold_pair(folded.query_positions, folded.key_positions);
  return folded;
}

template <typename Map>
AttentionResults attend(const AttentionProblem& problem) {
  const Map vmap(tensors_of(problem));
  const c10::impl::ExcludeDispatchKeyGuard not_again(vmap.key());
  if (!vmap.has_mapped()) return flash_attention(problem);
  const bool is_empty = vmap.size() == 0;       // which the kernels do not serve
  if (vmap.maps(problem.sinks) && !is_empty) {  // a logit a head, the same in every row of a batch
    return call_one_by_one(vmap, [&](int64_t i) { return flash_attention(element_of_call(vmap, problem, i)); });
  }
  AttentionProblem folded = fold_problem(vmap, problem);
  if (vmap.maps(problem.sinks)) folded.sinks = vmap.take_out(*problem.sinks).sum(0);  // of none: any will do
  const auto [out, lse] = is_empty ? reference_attention(folded) : flash_attention(folded);
  return {vmap.unfold(out, problem.batch()), vmap.unfold(lse, problem.batch())};
}

template <typename Map>
InputGradients attend_backward(const AttentionProblem& problem, const AttentionGradients& gradients) {
  const auto& [grad_out, grad_lse, out, lse] = gradients;
  const Map vmap(tensors_of(problem, grad_out, grad_lse, out, lse));
  const c10::impl::ExcludeDispatchKeyGuard not_again(vmap.key());
  if (!vmap.has_mapped()) return flash_attention_backward(problem, gradients);
  const AttentionProblem folded = fold_problem(vmap, problem);
  const AttentionGradients of_folded{vmap.fold(grad_out), vmap.fold(grad_lse), vmap.fold(out), vmap.fold(lse)};
  const auto [dq, dk, dv] =
      vmap.size() == 0 ? reference_attention_backward(folded, of_folded) : flash_attention_backward(folded, of_folded);
  const c10::SymInt batch = problem.batch();
  return {vmap.unfold(dq, batch), vmap.unfold(dk, batch), vmap.unfold(dv, batch)};
}

/// Memory that is not mapped cannot take a result that is: copy_ says so.
void register_into(torch::Library& m) {
  m.impl("flash_attention_backward.into", TORCH_FN(FlashAttentionBackwardInto::from_schema<copy_attention_backward>));
}

template <typename Map>
void register_rules(torch::Library& m) {
  m.impl("flash_attention", TORCH_FN(flash_attention_from_schema<attend<Map>>));
  m.impl("flash_attention_backward", TORCH_FN(FlashAttentionBackward::from_schema<attend_backward<Map>>));
  register_into(m);
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, FuncTorchBatched, m) { selfattn::register_rules<selfattn::FunctorchVmap>(m); }
TORCH_LIBRARY_IMPL(selfattn, Batched, m) { selfattn::register_rules<selfattn::BatchedGradientsVmap>(m); }
