// self_attention and projected_attention over a KV cache: the tokens of the call are appended to it, and attend to what
// it then holds.
#include "module/self_attention_kv_cache.h"

#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "attention/select_backend.h"
#include "common/plain_tensor.h"
#include "kv_cache/append.h"
#include "kv_cache/attention_op.h"
#include "kv_cache/positions.h"
#include "module/layer_call.h"
#include "module/projections.h"

namespace selfattn {
namespace {

/// What both operators take beside a layer's own arguments.
struct LayerCache {
  at::Tensor key, value;  // (P, page_size, NKV, head_dim), written
  at::Tensor lengths;     // (R,): slots in use before the call
  OptionalTensor page_table;
  OptionalTensor positions;   // (B, S): the slots of the call's tokens
  OptionalTensor draft_mask;  // (B, S, S)
  int64_t split_keys;
  OptionalTensor k_scale, v_scale;
};

/// Heads of a projection; under autocast in the dtype of the cache that they meet.
at::Tensor heads_for_cache(const at::Tensor& projected, const LayerCall& call, const LayerCache& cache) {
  const at::Tensor heads = split_heads(projected, call.head_dim);
  return is_autocast_on(heads) ? heads.to(cache.key.scalar_type()) : heads;
}

/// (B, S, heads * head_dim). Everything is checked, and a backend chosen, before anything is written.
at::Tensor append_and_attend(LayerCall call, const LayerCache& cache, const at::Tensor& q, const at::Tensor& k,
                             const at::Tensor& v) {
  check_caches(cache.key, cache.value);
  TORCH_CHECK(
      !any_requires_grad({q, k, v, cache.key, cache.value}),
      "selfattn: k_cache and v_cache are written without a gradient, and what is written requires one; call the "
      "layer under torch.no_grad()");
  call.norm_rope.q = heads_for_cache(q, call, cache);
  call.norm_rope.k = heads_for_cache(k, call, cache);
  const AttentionArguments& of = call.arguments;
  KvCacheProblem problem = make_kv_cache_problem(
      call.norm_rope.q, cache.key, cache.value, cache.lengths,
      {cache.page_table, of.segment_ids, of.is_causal, of.qk_scale, cache.positions, of.window_left, of.window_right,
       of.softcap, of.sinks, cache.draft_mask, cache.k_scale, cache.v_scale, cache.split_keys});
  const KvCacheBackend& backend = select_backend(parse_backend(call.backend), problem);
  at::Tensor positions;
  std::tie(problem.lengths, positions) = positions_of_append(cache.lengths, problem.segment_ids, problem.query_length(),
                                                             problem.capacity(), problem.positions);
  const AppendCall append{
      call.norm_rope.k, heads_for_cache(v, call, cache), positions, problem.page_table, problem.segment_ids, cache.key,
      cache.value};
  if (call.norm_rope.norm || call.norm_rope.rope) {
    problem.query = qk_norm_rope_append({call.norm_rope, append});
  } else {
    append_kv_cache(append);
  }
  return std::get<0>(backend.call(problem)).flatten(2, 3);
}

}  // namespace

at::Tensor projected_attention_kv_cache(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& q_norm_weight,
    const OptionalTensor& k_norm_weight, const OptionalTensor& sinks, const OptionalTensor& freqs_sin,
    const OptionalTensor& freqs_cos, const OptionalTensor& segment_ids, int64_t head_dim, double norm_eps,
    double rope_theta, c10::string_view rope_pairing, bool causal, std::optional<double> qk_scale,
    c10::string_view backend, int64_t window_left, int64_t window_right, double softcap, bool rope, at::Tensor& k_cache,
    at::Tensor& v_cache, const at::Tensor& lengths, const OptionalTensor& page_table, const OptionalTensor& positions,
    const OptionalTensor& draft_mask, int64_t split_keys, const OptionalTensor& k_scale,
    const OptionalTensor& v_scale) {
  check_head_dim(head_dim);
  check_projected(q, k, v, head_dim);
  return append_and_attend(
      make_layer_call(q, "q", q.sym_size(2) / head_dim, q_norm_weight, k_norm_weight, sinks, freqs_sin, freqs_cos,
                      segment_ids, head_dim, norm_eps, rope_theta, rope_pairing, causal, qk_scale, backend, window_left,
                      window_right, softcap, rope),
      {k_cache, v_cache, lengths, page_table, positions, draft_mask, split_keys, k_scale, v_scale}, q, k, v);
}

at::Tensor self_attention_kv_cache(const at::Tensor& x, const at::Tensor& q_weight, const at::Tensor& k_weight,
                                   const at::Tensor& v_weight, const at::Tensor& out_weight,
                                   const OptionalTensor& q_bias, const OptionalTensor& k_bias,
                                   const OptionalTensor& v_bias, const OptionalTensor& out_bias,
                                   const OptionalTensor& q_norm_weight, const OptionalTensor& k_norm_weight,
                                   const OptionalTensor& sinks, const OptionalTensor& freqs_sin,
                                   const OptionalTensor& freqs_cos, const OptionalTensor& segment_ids, int64_t head_dim,
                                   double norm_eps, double rope_theta, c10::string_view rope_pairing, bool causal,
                                   std::optional<double> qk_scale, c10::string_view backend, int64_t window_left,
                                   int64_t window_right, double softcap, bool rope, at::Tensor& k_cache,
                                   at::Tensor& v_cache, const at::Tensor& lengths, const OptionalTensor& page_table,
                                   const OptionalTensor& positions, const OptionalTensor& draft_mask,
                                   int64_t split_keys, const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  check_input(x, q_weight);
  check_head_dim(head_dim);
  const c10::SymInt heads = check_projections(x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, head_dim);
  check_output_projection(out_weight, out_bias, x, q_weight);
  const LayerCall call = make_layer_call(x, "x", heads, q_norm_weight, k_norm_weight, sinks, freqs_sin, freqs_cos,
                                         segment_ids, head_dim, norm_eps, rope_theta, rope_pairing, causal, qk_scale,
                                         backend, window_left, window_right, softcap, rope);
  const auto [q, k, v] = project_query_key_value(x, {q_weight, q_bias}, {k_weight, k_bias}, {v_weight, v_bias});
  return at::linear(
      append_and_attend(
          call, {k_cache, v_cache, lengths, page_table, positions, draft_mask, split_keys, k_scale, v_scale}, q, k, v),
      out_weight, out_bias);
}

}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, CompositeImplicitAutograd, m) {
  using namespace selfattn;
  m.impl("self_attention_kv_cache", TORCH_FN(self_attention_kv_cache));
  m.impl("projected_attention_kv_cache", TORCH_FN(projected_attention_kv_cache));
}
