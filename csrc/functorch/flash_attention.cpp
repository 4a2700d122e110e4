// vmap of flash_attention and of its gradient: the map becomes part of the batch.
#include <torch/library.h>

#include "attention/kernel_ops.h"
#include "functorch/vmap.h"

namespace selfattn {
namespace {

using Results = std::tuple<at::Tensor, at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

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

Results attend(const Vmap& vmap, const AttentionProblem& problem) {
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
Results flash_attention_batched(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const OptionalTensor& segment_ids, bool causal, std::optional<double> qk_scale,
                                const OptionalTensor& kv_segment_ids, int64_t window_left, int64_t window_right,
                                double softcap, const OptionalTensor& sinks) {
  const AttentionProblem problem = make_attention_problem(
      q, k, v, {segment_ids, causal, qk_scale, kv_segment_ids, window_left, window_right, softcap, sinks},
      /*needs_lse=*/true);
  return attend(Map({q, k, v, segment_ids, kv_segment_ids, sinks}), problem);
}

Gradients attend_backward(const Vmap& vmap, const AttentionProblem& problem, const AttentionGradients& gradients) {
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
Gradients flash_attention_backward_batched(const at::Tensor& grad_out, const OptionalTensor& grad_lse,
                                           const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                           const at::Tensor& out, const at::Tensor& lse,
                                           const OptionalTensor& segment_ids, bool causal,
                                           std::optional<double> qk_scale, const OptionalTensor& kv_segment_ids,
                                           int64_t window_left, int64_t window_right, double softcap) {
  const AttentionProblem problem = make_attention_problem(
      q, k, v, {segment_ids, causal, qk_scale, kv_segment_ids, window_left, window_right, softcap, std::nullopt},
      /*needs_lse=*/true);
  return attend_backward(Map({grad_out, grad_lse, q, k, v, out, lse, segment_ids, kv_segment_ids}), problem,
                         {grad_out, grad_lse, out, lse});
}

/// Memory that is not mapped cannot take a result that is: copy_ says so.
void flash_attention_backward_into_batched(const at::Tensor& grad_out, const OptionalTensor& grad_lse,
                                           const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                           const at::Tensor& out, const at::Tensor& lse,
                                           const OptionalTensor& segment_ids, bool causal,
                                           std::optional<double> qk_scale, const OptionalTensor& kv_segment_ids,
                                           int64_t window_left, int64_t window_right, double softcap, at::Tensor& dq,
                                           at::Tensor& dk, at::Tensor& dv) {
  const AttentionProblem problem = make_attention_problem(
      q, k, v, {segment_ids, causal, qk_scale, kv_segment_ids, window_left, window_right, softcap, std::nullopt},
      /*needs_lse=*/true);
  const auto [of_q, of_k, of_v] = flash_attention_backward(problem, {grad_out, grad_lse, out, lse});
  dq.copy_(of_q);
  dk.copy_(of_k);
  dv.copy_(of_v);
}

template <typename Map>
void register_rules(torch::Library& m) {
  m.impl("flash_attention", TORCH_FN(flash_attention_batched<Map>));
  m.impl("flash_attention_backward", TORCH_FN(flash_attention_backward_batched<Map>));
  m.impl("flash_attention_backward.into", TORCH_FN(flash_attention_backward_into_batched));
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, FuncTorchBatched, m) { selfattn::register_rules<selfattn::FunctorchVmap>(m); }
TORCH_LIBRARY_IMPL(selfattn, Batched, m) { selfattn::register_rules<selfattn::BatchedGradientsVmap>(m); }
