// vmap of qk_norm_rope and of its gradient: the map becomes part of the batch.
#include "functorch/vmap.h"
#include "rotary/norm_rope.h"

namespace selfattn {
namespace {

/// A weight of each element of the map, (D,) -> (M * B, 1, 1, D), which only the composition takes.
OptionalTensor fold_weight(const Vmap& vmap, const OptionalTensor& weight, const c10::SymInt& batch) {
  if (!vmap.maps(weight)) return weight;
  const at::Tensor of_rows = vmap.take_out(*weight).unsqueeze(1);  // (M, 1, D)
  return of_rows.expand_symint({vmap.size(), batch, weight->sym_size(0)}).flatten(0, 1).unsqueeze(1).unsqueeze(1);
}

/// The call of every element of the map as one, for heads of `batch_q` and `batch_k` rows.
NormRopeCall fold_call(const Vmap& vmap, const NormRopeCall& call, const c10::SymInt& batch_q,
                       const c10::SymInt& batch_k) {
  NormRopeCall folded = call;
  folded.q = vmap.fold(call.q);
  folded.k = vmap.fold(call.k);
  folded.q_weight = fold_weight(vmap, call.q_weight, batch_q);
  folded.k_weight = fold_weight(vmap, call.k_weight, batch_k);
  folded.freqs_sin = vmap.fold_rows(call.freqs_sin, batch_q);
  folded.freqs_cos = vmap.fold_rows(call.freqs_cos, batch_q);
  folded.positions = vmap.fold_rows(call.positions, batch_q);
  return folded;
}

/// Angles of each element of the map for heads of different batches have no one batch to fold into.
bool folds(const Vmap& vmap, const NormRopeCall& call, const at::Tensor& q, const at::Tensor& k) {
  const bool maps_angles = vmap.maps(call.freqs_sin) || vmap.maps(call.freqs_cos) || vmap.maps(call.positions);
  return !maps_angles || q.sym_size(0) == k.sym_size(0);
}

template <typename Map>
NormRopeHeads qk_norm_rope_batched(const NormRopeCall& call) {
  const Map vmap(tensors_of(call));
  const c10::impl::ExcludeDispatchKeyGuard not_again(vmap.key());
  if (!vmap.has_mapped()) return qk_norm_rope(call);
  if (!folds(vmap, call, call.q, call.k)) {
    return call_one_by_one(vmap, [&](int64_t i) { return qk_norm_rope(element_of_call(vmap, call, i)); });
  }
  const c10::SymInt batch_q = call.q.sym_size(0), batch_k = call.k.sym_size(0);
  const NormRopeCall folded = fold_call(vmap, call, batch_q, batch_k);
  const bool maps_weights = vmap.maps(call.q_weight) || vmap.maps(call.k_weight);
  const auto [q, k] = maps_weights ? compose_norm_rope(folded) : qk_norm_rope(folded);
  return {vmap.unfold(q, batch_q), vmap.unfold(k, batch_k)};
}

/// The kernels sum a weight's gradient over the whole batch: where each element of the map wants its own sum, the
/// composition gives them.
template <typename Map>
NormRopeGradients qk_norm_rope_backward_batched(const NormRopeCall& call, const at::Tensor& grad_q,
                                                const at::Tensor& grad_k) {
  const Map vmap(tensors_of(call, grad_q, grad_k));
  const c10::impl::ExcludeDispatchKeyGuard not_again(vmap.key());
  if (!vmap.has_mapped()) return qk_norm_rope_backward(call, grad_q, grad_k);
  if (!folds(vmap, call, grad_q, grad_k)) {
    return call_one_by_one(vmap, [&](int64_t i) {
      return qk_norm_rope_backward(element_of_call(vmap, call, i), vmap.element(grad_q, i), vmap.element(grad_k, i));
    });
  }
  const c10::SymInt batch_q = grad_q.sym_size(0), batch_k = grad_k.sym_size(0);
  const NormRopeCall folded = fold_call(vmap, call, batch_q, batch_k);
  const at::Tensor folded_q = vmap.fold(grad_q), folded_k = vmap.fold(grad_k);
  const bool has_weights = call.q_weight || call.k_weight;
  const auto [dq, dk, dq_weight, dk_weight] = has_weights
                                                  ? compose_norm_rope_backward(folded, folded_q, folded_k, vmap.size())
                                                  : qk_norm_rope_backward(folded, folded_q, folded_k);
  return {vmap.unfold(dq, batch_q), vmap.unfold(dk, batch_k), call.q_weight ? vmap.put_in(dq_weight) : dq_weight,
          call.k_weight ? vmap.put_in(dk_weight) : dk_weight};
}

// Memory that is not mapped cannot take a result that is: copy_ says so.
template <typename Map>
void register_rules(torch::Library& m) {
  register_norm_rope<qk_norm_rope_batched<Map>, qk_norm_rope_backward_batched<Map>, copy_norm_rope_backward>(m);
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, FuncTorchBatched, m) { selfattn::register_rules<selfattn::FunctorchVmap>(m); }
TORCH_LIBRARY_IMPL(selfattn, Batched, m) { selfattn::register_rules<selfattn::BatchedGradientsVmap>(m); }
