// The C++ fronts of the operators: each a typed call through the dispatcher.
#include <selfattn/ops.h>
#include <selfattn/rope.h>

#include "attention/multihead_attention.h"
#include "common/dispatch.h"
#include "kv_cache/append.h"
#include "kv_cache/attention_op.h"
#include "kv_cache/positions.h"
#include "rotary/norm_rope.h"

namespace selfattn {
namespace {

KvCacheArguments arguments_of(const KVCacheAttentionOptions& options) {
  return {.page_table = options.page_table(),
          .segment_ids = options.segment_ids(),
          .is_causal = options.causal(),
          .qk_scale = options.qk_scale(),
          .positions = options.positions(),
          .window_left = options.window_left(),
          .window_right = options.window_right(),
          .softcap = options.softcap(),
          .sinks = options.sinks(),
          .draft_mask = options.draft_mask(),
          .split_keys = options.split_keys()};
}

}  // namespace

at::Tensor multihead_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const AttentionOptions& options) {
  return call_multihead<at::Tensor>(q, k, v, options);
}

std::tuple<at::Tensor, at::Tensor> multihead_attention_lse(const at::Tensor& q, const at::Tensor& k,
                                                           const at::Tensor& v, const AttentionOptions& options) {
  return call_multihead<std::tuple<at::Tensor, at::Tensor>>(q, k, v, options);
}

std::string explain_backend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const AttentionOptions& options) {
  return call_multihead<std::string>(q, k, v, options);
}

std::tuple<at::Tensor, at::Tensor> merge_attention(const at::Tensor& out, const at::Tensor& lse,
                                                   const at::Tensor& other_out, const at::Tensor& other_lse) {
  static const auto op = find_op<decltype(merge_attention)>("selfattn::merge_attention");
  return op.call(out, lse, other_out, other_lse);
}

at::Tensor attention_with_kv_cache(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                                   const at::Tensor& lengths, const KVCacheAttentionOptions& options) {
  return call_kv_cache<at::Tensor>(q, k_cache, v_cache, lengths, arguments_of(options), options.backend());
}

std::tuple<at::Tensor, at::Tensor> attention_with_kv_cache_lse(const at::Tensor& q, const at::Tensor& k_cache,
                                                               const at::Tensor& v_cache, const at::Tensor& lengths,
                                                               const KVCacheAttentionOptions& options) {
  return call_kv_cache<std::tuple<at::Tensor, at::Tensor>>(q, k_cache, v_cache, lengths, arguments_of(options),
                                                           options.backend());
}

std::string explain_kv_cache_backend(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                                     const at::Tensor& lengths, const KVCacheAttentionOptions& options) {
  return call_kv_cache<std::string>(q, k_cache, v_cache, lengths, arguments_of(options), options.backend());
}

void append_kv_cache(const at::Tensor& k, const at::Tensor& v, const at::Tensor& positions, const at::Tensor& k_cache,
                     const at::Tensor& v_cache, const OptionalTensor& page_table, const OptionalTensor& segment_ids) {
  append_kv_cache({k, v, positions, page_table, segment_ids, k_cache, v_cache});
}

at::Tensor lengths_after_append(const at::Tensor& lengths, const OptionalTensor& segment_ids, int64_t num_tokens) {
  return lengths_after_append(lengths, segment_ids, c10::SymInt(num_tokens));
}

at::Tensor kv_cache_positions(const at::Tensor& lengths, const OptionalTensor& segment_ids, int64_t num_tokens,
                              int64_t capacity) {
  return kv_cache_positions(lengths, segment_ids, num_tokens, capacity, /*positions=*/std::nullopt);
}

at::Tensor segment_mask(const at::Tensor& segment_ids, const OptionalTensor& kv_segment_ids) {
  static const auto op = find_op<decltype(segment_mask)>("selfattn::segment_mask");
  return op.call(segment_ids, kv_segment_ids);
}

at::Tensor segment_ids_from_positions(const at::Tensor& positions) {
  static const auto op = find_op<decltype(segment_ids_from_positions)>("selfattn::segment_ids_from_positions");
  return op.call(positions);
}

at::Tensor segment_ids_from_cu_seqlens(const at::Tensor& cu_seqlens, int64_t length) {
  static const auto op = find_op<decltype(segment_ids_from_cu_seqlens)>("selfattn::segment_ids_from_cu_seqlens");
  return op.call(cu_seqlens, length);
}

at::Tensor cu_seqlens_from_segment_ids(const at::Tensor& segment_ids, int64_t max_segments) {
  static const auto op = find_op<decltype(cu_seqlens_from_segment_ids)>("selfattn::cu_seqlens_from_segment_ids");
  return op.call(segment_ids, max_segments);
}

std::tuple<at::Tensor, at::Tensor> precompute_freqs(int64_t feat_dim, const FreqsOptions& options) {
  using Schema = std::tuple<at::Tensor, at::Tensor>(int64_t, const OptionalTensor&, std::optional<int64_t>, double,
                                                    std::optional<at::ScalarType>, std::optional<at::Device>);
  static const auto op = find_op<Schema>("selfattn::precompute_freqs");
  return op.call(feat_dim, options.pos_idx(), options.max_length(), options.theta(), options.dtype(), options.device());
}

std::tuple<at::Tensor, at::Tensor> rope_tables(const RopeParameters& of, const RopeTablesOptions& options) {
  using Number = std::optional<double>;
  using Numbers = std::optional<at::ArrayRef<double>>;
  using Size = std::optional<c10::SymInt>;
  using Schema = std::tuple<at::Tensor, at::Tensor>(int64_t, const OptionalTensor&, Size, c10::string_view, double,
                                                    Size, Number, std::optional<int64_t>, Number, Number, Number,
                                                    Number, Number, Number, Number, std::optional<bool>, Numbers,
                                                    Numbers, std::optional<at::ScalarType>, std::optional<at::Device>);
  static const auto op = find_op<Schema>("selfattn::rope_tables");
  const auto size = [](const std::optional<int64_t>& of) { return of ? Size(*of) : std::nullopt; };
  const auto numbers = [](const std::optional<std::vector<double>>& of) { return of ? Numbers(*of) : Numbers(); };
  return op.call(of.rotary_dim(), options.positions(), size(options.max_length()), of.rope_type(), of.rope_theta(),
                 size(options.length()), of.factor(), of.original_max_position_embeddings(), of.low_freq_factor(),
                 of.high_freq_factor(), of.attention_factor(), of.beta_fast(), of.beta_slow(), of.mscale(),
                 of.mscale_all_dim(), of.truncate(), numbers(of.short_factor()), numbers(of.long_factor()),
                 options.dtype(), options.device());
}

std::tuple<at::Tensor, at::Tensor> apply_rotary_emb(const at::Tensor& xq, const at::Tensor& xk,
                                                    const RotaryOptions& options) {
  using Schema = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                                    const OptionalTensor&, double, c10::string_view);
  static const auto op = find_op<Schema>("selfattn::apply_rotary_emb");
  return op.call(xq, xk, options.freqs_sin(), options.freqs_cos(), options.theta(), options.pairing());
}

std::tuple<at::Tensor, at::Tensor> qk_norm_rope(const at::Tensor& q, const at::Tensor& k,
                                                const QkNormRopeOptions& options) {
  return qk_norm_rope({q, k, options.q_weight(), options.k_weight(), options.freqs_sin(), options.freqs_cos(),
                       options.norm(), options.eps(), options.rope(), options.positions(), options.theta(),
                       parse_pairing(options.pairing(), "pairing")});
}

at::Tensor qk_norm_rope_append(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const at::Tensor& positions, const at::Tensor& k_cache, const at::Tensor& v_cache,
                               const QkNormRopeOptions& options, const OptionalTensor& page_table,
                               const OptionalTensor& segment_ids) {
  TORCH_CHECK_VALUE(!options.positions(), "selfattn: positions of the options must not be given beside positions");
  return qk_norm_rope_append({{q, k, options.q_weight(), options.k_weight(), options.freqs_sin(), options.freqs_cos(),
                               options.norm(), options.eps(), options.rope(), /*positions=*/std::nullopt,
                               options.theta(), parse_pairing(options.pairing(), "pairing")},
                              {k, v, positions, page_table, segment_ids, k_cache, v_cache}});
}

}  // namespace selfattn
