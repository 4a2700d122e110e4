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
  if (problem.has_segments()) {
    const bool are_alike = problem.key_segment_ids->is_same(*problem.query_segment_ids);
    folded.query_segment_ids = vmap.fold(problem.query_segment_ids);
    folded.key_segment_ids = are_alike ? folded.query_segment_ids : vmap.fold(problem.key_segment_ids);
  }
  return folded;
}

AttentionProblem element_of_problem(const Vmap& vmap, const AttentionProblem& problem, int64_t index) {
  AttentionProblem element = problem;
  element.query = vmap.element(problem.query, index);
  element.key = vmap.element(problem.key, index);
  element.value = vmap.element(problem.value, index);
  element.query_segment_ids = vmap.element(problem.query_segment_ids, index);
  element.key_segment_ids = vmap.element(problem.key_segment_ids, index);
  element.sinks = vmap.element(problem.sinks, index);
  return element;
}

AttentionResults attend(const Vmap& vmap, const AttentionProblem& problem) {
  const c10::impl::ExcludeDispatchKeyGuard not_again(vmap.key());
  if (!vmap.has_mapped()) return flash_attention(problem);
  const bool is_empty = vmap.size() == 0;       // which the kernels do not serve
  if (vmap.maps(problem.sinks) && !is_empty) {  // a logit a head, the same in every row of a batch
    return call_one_by_one(vmap, [&](int64_t i) { return flash_attention(element_of_problem(vmap, problem, i)); });
  }
  AttentionProblem folded = fold_problem(vmap, problem);
  if (vmap.maps(problem.sinks)) folded.sinks = vmap.take_out(*problem.sinks).sum(0);  // of none: any will do
  const auto [out, lse] = is_empty ? reference_attention(folded) : flash_attention(folded);
  return {vmap.unfold(out, problem.batch()), vmap.unfold(lse, problem.batch())};
}

template <typename Map>
AttentionResults attend_mapped(const AttentionProblem& problem) {
  return attend(Map({problem.query, problem.key, problem.value, problem.query_segment_ids, problem.key_segment_ids,
                     problem.sinks}),
                problem);
}

InputGradients attend_backward(const Vmap& vmap, const AttentionProblem& problem, const AttentionGradients& gradients) {
  const c10::impl::ExcludeDispatchKeyGuard not_again(vmap.key());
  if (!vmap.has_mapped()) return flash_attention_backward(problem, gradients);
  const AttentionProblem folded = fold_problem(vmap, problem);
  const AttentionGradients of_folded{vmap.fold(gradients.grad_out), vmap.fold(gradients.grad_lse),
                                     vmap.fold(gradients.out), vmap.fold(gradients.lse)};
  const auto [dq, dk, dv] =
      vmap.size() == 0 ? reference_attention_backward(folded, of_folded) : flash_attention_backward(folded, of_folded);
  const c10::SymInt batch = problem.batch();
  return {vmap.unfold(dq, batch), vmap.unfold(dk, batch), vmap.unfold(dv, batch)};
}

template <typename Map>
InputGradients attend_backward_mapped(const AttentionProblem& problem, const AttentionGradients& gradients) {
  return attend_backward(Map({gradients.grad_out, gradients.grad_lse, problem.query, problem.key, problem.value,
                              gradients.out, gradients.lse, problem.query_segment_ids, problem.key_segment_ids}),
                         problem, gradients);
}

/// Memory that is not mapped cannot take a result that is: copy_ says so.
void attend_backward_into(const AttentionProblem& problem, const AttentionGradients& gradients, const at::Tensor& dq,
                          const at::Tensor& dk, const at::Tensor& dv) {
  const auto [of_q, of_k, of_v] = flash_attention_backward(problem, gradients);
  dq.copy_(of_q), dk.copy_(of_k), dv.copy_(of_v);
}

void register_into(torch::Library& m) {
  m.impl("flash_attention_backward.into", TORCH_FN(FlashAttentionBackwardInto::from_schema<attend_backward_into>));
}

template <typename Map>
void register_rules(torch::Library& m) {
  m.impl("flash_attention", TORCH_FN(flash_attention_from_schema<attend_mapped<Map>>));
  m.impl("flash_attention_backward", TORCH_FN(FlashAttentionBackward::from_schema<attend_backward_mapped<Map>>));
  register_into(m);
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, FuncTorchBatched, m) { selfattn::register_rules<selfattn::FunctorchVmap>(m); }
TORCH_LIBRARY_IMPL(selfattn, Batched, m) { selfattn::register_rules<selfattn::BatchedGradientsVmap>(m); }
