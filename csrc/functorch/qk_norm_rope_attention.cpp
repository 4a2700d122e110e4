// vmap of qk_norm_rope_attention: the map becomes part of the batch where all that is mapped has one; its parts, which
// have rules of their own, serve the rest.
#include <torch/library.h>

#include "functorch/vmap.h"
#include "norm_rope_attention/call.h"

namespace selfattn {
namespace {

template <typename Map>
AttentionResults qk_norm_rope_attention_batched(const NormRopeAttentionCall& call) {
  const NormRopeCall& norm_rope = call.norm_rope;
  const AttentionProblem& problem = call.problem;
  const Map vmap(tensors_of(norm_rope, problem.value, problem.query_segment_ids, problem.sinks));
  const bool maps_without_batch =
      vmap.maps(norm_rope.q_weight) || vmap.maps(norm_rope.k_weight) || vmap.maps(problem.sinks);
  if (vmap.has_mapped() && (maps_without_batch || vmap.size() == 0)) return norm_rope_then_attend(call);
  const c10::impl::ExcludeDispatchKeyGuard not_again(vmap.key());
  if (!vmap.has_mapped()) return qk_norm_rope_attention(call);
  NormRopeAttentionCall folded = call;
  folded.norm_rope.q = vmap.fold(norm_rope.q);
  folded.norm_rope.k = vmap.fold(norm_rope.k);
  folded.norm_rope.freqs_sin = vmap.fold_rows(norm_rope.freqs_sin, problem.batch());
  folded.norm_rope.freqs_cos = vmap.fold_rows(norm_rope.freqs_cos, problem.batch());
  folded.problem.value = vmap.fold(problem.value);
  folded.problem.query_segment_ids = vmap.fold(problem.query_segment_ids);
  const auto [out, lse] = qk_norm_rope_attention(folded);
  return {vmap.unfold(out, problem.batch()), vmap.unfold(lse, problem.batch())};
}

/// Where gradients alone are mapped, which is the usual case, its parts make the rotated q and k once for all.
void register_gradient(torch::Library& m) {
  m.impl("qk_norm_rope_attention_backward",
         TORCH_FN(NormRopeAttentionBackward::from_schema<attend_backward_then_norm_rope>));
}

template <typename Map>
void register_rules(torch::Library& m) {
  m.impl("qk_norm_rope_attention", TORCH_FN(NormRopeAttention::from_schema<qk_norm_rope_attention_batched<Map>>));
  register_gradient(m);
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, FuncTorchBatched, m) { selfattn::register_rules<selfattn::FunctorchVmap>(m); }
TORCH_LIBRARY_IMPL(selfattn, Batched, m) { selfattn::register_rules<selfattn::BatchedGradientsVmap>(m); }
