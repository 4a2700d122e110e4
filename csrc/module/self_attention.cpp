// self_attention: the module's forward, once, for C++, Python and TorchScript; and the C++ module's, which calls it.
#include <ATen/ops/dropout.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/rms_norm.h>
#include <selfattn/backend.h>
#include <selfattn/self_attention.h>
#include <torch/library.h>

#include <utility>

#include "attention/multihead_attention.h"
#include "autograd/buffer_donation.h"
#include "kv_cache/positions.h"
#include "module/layer_call.h"
#include "module/projections.h"
#include "module/self_attention_kv_cache.h"
#include "norm_rope_attention/call.h"

namespace selfattn {
namespace {

/// Norm, rotation and attention. Takes the first call by value: unless autograd keeps them, the raw q and k end when
/// the rotated ones are there.
at::Tensor attend(NormRopeCall norm_rope, const at::Tensor& value, const AttentionArguments& arguments,
                  c10::string_view backend) {
  if (const auto call = as_one_operator(norm_rope, value, arguments, backend)) {
    return std::get<0>(qk_norm_rope_attention(*call));
  }
  if (!norm_rope.norm && !norm_rope.rope) {
    return call_multihead<at::Tensor>(norm_rope.q, norm_rope.k, value, arguments, backend);
  }
  const auto [query, key] = qk_norm_rope(norm_rope);
  norm_rope.q.reset(), norm_rope.k.reset();
  return call_multihead<at::Tensor>(query, key, value, arguments, backend);
}

/// (B, S, heads * head_dim). Takes q and k by value: see attend.
at::Tensor attend_projected(LayerCall call, at::Tensor q, at::Tensor k, const at::Tensor& v) {
  call.norm_rope.q = split_heads(std::exchange(q, {}), call.head_dim);
  call.norm_rope.k = split_heads(std::exchange(k, {}), call.head_dim);
  return attend(std::move(call.norm_rope), split_heads(v, call.head_dim), call.arguments, call.backend).flatten(2, 3);
}

at::Tensor projected_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const OptionalTensor& q_norm_weight, const OptionalTensor& k_norm_weight,
                               const OptionalTensor& sinks, const OptionalTensor& freqs_sin,
                               const OptionalTensor& freqs_cos, const OptionalTensor& segment_ids, int64_t head_dim,
                               double norm_eps, double rope_theta, c10::string_view rope_pairing, bool causal,
                               std::optional<double> qk_scale, c10::string_view backend, int64_t window_left,
                               int64_t window_right, double softcap, bool rope) {
  check_head_dim(head_dim);
  check_projected(q, k, v, head_dim);
  return attend_projected(
      make_layer_call(q, "q", q.sym_size(2) / head_dim, q_norm_weight, k_norm_weight, sinks, freqs_sin, freqs_cos,
                      segment_ids, head_dim, norm_eps, rope_theta, rope_pairing, causal, qk_scale, backend, window_left,
                      window_right, softcap, rope),
      q, k, v);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> project(const at::Tensor& x, const at::Tensor& q_weight,
                                                       const at::Tensor& k_weight, const at::Tensor& v_weight,
                                                       const OptionalTensor& q_bias, const OptionalTensor& k_bias,
                                                       const OptionalTensor& v_bias) {
  check_input(x, q_weight);
  check_projections(x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, /*head_dim=*/1);
  return project_query_key_value(x, {q_weight, q_bias}, {k_weight, k_bias}, {v_weight, v_bias});
}

at::Tensor self_attention(const at::Tensor& x, const at::Tensor& q_weight, const at::Tensor& k_weight,
                          const at::Tensor& v_weight, const at::Tensor& out_weight, const OptionalTensor& q_bias,
                          const OptionalTensor& k_bias, const OptionalTensor& v_bias, const OptionalTensor& out_bias,
                          const OptionalTensor& q_norm_weight, const OptionalTensor& k_norm_weight,
                          const OptionalTensor& sinks, const OptionalTensor& freqs_sin, const OptionalTensor& freqs_cos,
                          const OptionalTensor& segment_ids, int64_t head_dim, double norm_eps, double rope_theta,
                          c10::string_view rope_pairing, bool causal, std::optional<double> qk_scale,
                          c10::string_view backend, int64_t window_left, int64_t window_right, double softcap,
                          double dropout_rate, bool training, bool rope) {
  check_input(x, q_weight);
  check_head_dim(head_dim);
  TORCH_CHECK_VALUE(dropout_rate >= 0.0 && dropout_rate < 1.0,
                    "selfattn: dropout_rate must be at least 0 and below 1; got ", dropout_rate);
  const c10::SymInt heads = check_projections(x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, head_dim);
  check_output_projection(out_weight, out_bias, x, q_weight);
  LayerCall call = make_layer_call(x, "x", heads, q_norm_weight, k_norm_weight, sinks, freqs_sin, freqs_cos,
                                   segment_ids, head_dim, norm_eps, rope_theta, rope_pairing, causal, qk_scale, backend,
                                   window_left, window_right, softcap, rope);

  auto [q, k, v] = project_query_key_value(x, {q_weight, q_bias}, {k_weight, k_bias}, {v_weight, v_bias});
  const auto attend_own_heads = [&] {
    const DonatedBuffers donated;  // nobody else has seen them; those of projected_attention others may hold
    return attend_projected(std::move(call), std::move(q), std::move(k), v);
  };
  const at::Tensor attended = attend_own_heads();
  const at::Tensor out = at::linear(attended, out_weight, out_bias);
  return dropout_rate > 0.0 && training ? at::dropout(out, dropout_rate, /*train=*/true) : out;
}

}  // namespace

torch::Tensor SelfAttentionImpl::forward(const torch::Tensor& x, const torch::Tensor& freqs_sin,
                                         const torch::Tensor& freqs_cos, const torch::Tensor& segment_ids) {
  return forward_at(x, /*positions=*/{}, freqs_sin, freqs_cos, segment_ids, /*cache=*/nullptr);
}

torch::Tensor SelfAttentionImpl::forward_with_cache(const torch::Tensor& x, const KVCacheLayer& cache,
                                                    const torch::Tensor& freqs_sin, const torch::Tensor& freqs_cos,
                                                    const torch::Tensor& segment_ids) {
  torch::Tensor positions;
  if (makes_tables() && !freqs_sin.defined() && !freqs_cos.defined() && x.dim() == 3) {
    const std::string type = rope_parameters().rope_type();
    TORCH_CHECK_VALUE(options.rope_length() || (type != "dynamic" && type != "longrope"),
                      "selfattn: rope_length must be given, so that all keys of a cache are rotated by the same "
                      "frequencies of rope_type ",
                      type, "; got none");
    const OptionalTensor ids = as_optional(segment_ids);
    const c10::SymInt pages_per_row = cache.page_table ? cache.page_table->sym_size(1) : c10::SymInt(1);
    positions = std::get<1>(positions_of_append(cache.lengths, ids, x.sym_size(1),
                                                pages_per_row * cache.keys.sym_size(1), /*positions=*/std::nullopt));
  }
  return forward_at(x, positions, freqs_sin, freqs_cos, segment_ids, &cache);
}

torch::Tensor SelfAttentionImpl::forward_at(const torch::Tensor& x, const torch::Tensor& positions,
                                            torch::Tensor freqs_sin, torch::Tensor freqs_cos,
                                            const torch::Tensor& segment_ids, const KVCacheLayer* cache) {
  if (makes_tables() && !freqs_sin.defined() && !freqs_cos.defined() && x.dim() == 3) {
    auto of = RopeTablesOptions()
                  .length(options.rope_length())
                  .dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat)
                  .device(x.device());
    if (positions.defined()) {
      of.positions(positions);
    } else {
      of.max_length(x.size(1));
    }
    std::tie(freqs_sin, freqs_cos) = rope_tables(rope_parameters(), of);
  }
  check_children();
  return is_plain() ? call_operator(x, freqs_sin, freqs_cos, segment_ids, cache)
                    : compose(x, freqs_sin, freqs_cos, segment_ids, cache);
}

torch::Tensor SelfAttentionImpl::call_operator(const torch::Tensor& x, const torch::Tensor& freqs_sin,
                                               const torch::Tensor& freqs_cos, const torch::Tensor& segment_ids,
                                               const KVCacheLayer* cache) {
  TORCH_CHECK_VALUE(x.dim() == 3 && x.sym_size(2) == options.embedding_dim(),
                    "selfattn: x must have the shape (B, S, E) with E ", options.embedding_dim(), "; got ",
                    x.sym_sizes());
  const OptionalTensor q_factor = q_norm ? OptionalTensor(q_norm->factor()) : std::nullopt;
  const OptionalTensor k_factor = k_norm ? OptionalTensor(k_norm->factor()) : std::nullopt;
  if (cache) {
    static const auto op = find_op<decltype(self_attention_kv_cache)>("selfattn::self_attention_kv_cache");
    at::Tensor keys = cache->keys, values = cache->values;
    const at::Tensor out =
        op.call(x, q_proj->weight, k_proj->weight, v_proj->weight, out_proj->weight, as_optional(q_proj->bias),
                as_optional(k_proj->bias), as_optional(v_proj->bias), as_optional(out_proj->bias), q_factor, k_factor,
                as_optional(sinks), as_optional(freqs_sin), as_optional(freqs_cos), as_optional(segment_ids),
                options.head_dim(), options.norm_eps(), options.rope_theta(), options.rope_pairing(), options.causal(),
                options.qk_scale(), options.attention_backend(), options.window_left(), options.window_right(),
                options.softcap(), options.rope(), keys, values, cache->lengths, cache->page_table,
                /*positions=*/std::nullopt, /*draft_mask=*/std::nullopt, /*split_keys=*/0, /*k_scale=*/std::nullopt,
                /*v_scale=*/std::nullopt);
    return at::dropout(out, options.dropout_rate(), is_training());
  }
  static const auto op = find_op<decltype(self_attention)>("selfattn::self_attention");
  return op.call(x, q_proj->weight, k_proj->weight, v_proj->weight, out_proj->weight, as_optional(q_proj->bias),
                 as_optional(k_proj->bias), as_optional(v_proj->bias), as_optional(out_proj->bias), q_factor, k_factor,
                 as_optional(sinks), as_optional(freqs_sin), as_optional(freqs_cos), as_optional(segment_ids),
                 options.head_dim(), options.norm_eps(), options.rope_theta(), options.rope_pairing(), options.causal(),
                 options.qk_scale(), options.attention_backend(), options.window_left(), options.window_right(),
                 options.softcap(), options.dropout_rate(), is_training(), options.rope());
}

torch::Tensor SelfAttentionImpl::compose(const torch::Tensor& x, const torch::Tensor& freqs_sin,
                                         const torch::Tensor& freqs_cos, const torch::Tensor& segment_ids,
                                         const KVCacheLayer* cache) {
  const auto project = [&](const char* name, torch::nn::Linear& projection, const torch::Tensor& input) {
    const auto found = replaced_.find(name);
    return found == replaced_.end() ? projection->forward(input) : found->second.forward(input);
  };
  torch::Tensor q = project("q_proj", q_proj, x), k = project("k_proj", k_proj, x);
  const torch::Tensor v = project("v_proj", v_proj, x);
  const bool calls_norms = replaced_.contains("q_norm") || replaced_.contains("k_norm") || normalises_projections();
  if (calls_norms) {
    const auto normalise = [&](const char* name, const HeadNorm& norm, const torch::Tensor& projected) {
      const torch::Tensor heads = normalises_projections() ? projected : split_heads(projected, options.head_dim());
      const auto found = replaced_.find(name);
      if (found != replaced_.end()) return found->second.forward(heads).reshape_as(projected);
      const torch::Tensor factor = norm->factor(), wide = heads.to(factor.scalar_type());
      const torch::Tensor normalised = at::rms_norm(wide, factor.sizes(), factor, options.norm_eps());
      return normalised.to(heads.scalar_type()).reshape_as(projected);
    };
    q = normalise("q_norm", q_norm, q), k = normalise("k_norm", k_norm, k);
  }
  const bool fuses_norms = q_norm && !calls_norms;
  const OptionalTensor q_factor = fuses_norms ? OptionalTensor(q_norm->factor()) : std::nullopt;
  const OptionalTensor k_factor = fuses_norms ? OptionalTensor(k_norm->factor()) : std::nullopt;
  const auto attend = [&](const auto& attention, auto&&... of_cache) {
    return attention(q, k, v, q_factor, k_factor, as_optional(sinks), as_optional(freqs_sin), as_optional(freqs_cos),
                     as_optional(segment_ids), options.head_dim(), options.norm_eps(), options.rope_theta(),
                     options.rope_pairing(), options.causal(), options.qk_scale(), options.attention_backend(),
                     options.window_left(), options.window_right(), options.softcap(), options.rope(), of_cache...);
  };
  torch::Tensor attended;
  if (cache) {
    at::Tensor keys = cache->keys, values = cache->values;
    attended = attend(projected_attention_kv_cache, keys, values, cache->lengths, cache->page_table,
                      /*positions=*/OptionalTensor(), /*draft_mask=*/OptionalTensor(), /*split_keys=*/0,
                      /*k_scale=*/OptionalTensor(), /*v_scale=*/OptionalTensor());
  } else {
    attended = attend(projected_attention);
  }
  return at::dropout(project("out_proj", out_proj, attended), options.dropout_rate(), is_training());
}

}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, CompositeImplicitAutograd, m) {
  using namespace selfattn;
  m.impl("self_attention", TORCH_FN(self_attention));
  m.impl("project_query_key_value", TORCH_FN(project));
  m.impl("projected_attention", TORCH_FN(projected_attention));
}
