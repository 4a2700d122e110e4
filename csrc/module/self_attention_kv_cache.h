#pragma once

#include <string_view>

#include "common/optional_tensor.h"

namespace selfattn {

/// self_attention and projected_attention over a KV cache, whose schemas say what each argument is: what is registered
/// under their names, and what the C++ module calls.
at::Tensor self_attention_kv_cache(
    const at::Tensor& x, const at::Tensor& q_weight, const at::Tensor& k_weight, const at::Tensor& v_weight,
    const at::Tensor& out_weight, const OptionalTensor& q_bias, const OptionalTensor& k_bias,
    const OptionalTensor& v_bias, const OptionalTensor& out_bias, const OptionalTensor& q_norm_weight,
    const OptionalTensor& k_norm_weight, const OptionalTensor& sinks, const OptionalTensor& freqs_sin,
    const OptionalTensor& freqs_cos, const OptionalTensor& segment_ids, int64_t head_dim, double norm_eps,
    double rope_theta, c10::string_view rope_pairing, bool causal, std::optional<double> qk_scale,
    c10::string_view backend, int64_t window_left, int64_t window_right, double softcap, bool rope, at::Tensor& k_cache,
    at::Tensor& v_cache, const at::Tensor& lengths, const OptionalTensor& page_table, const OptionalTensor& positions,
    const OptionalTensor& draft_mask, int64_t split_keys, const OptionalTensor& k_scale, const OptionalTensor& v_scale);
at::Tensor projected_attention_kv_cache(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& q_norm_weight,
    const OptionalTensor& k_norm_weight, const OptionalTensor& sinks, const OptionalTensor& freqs_sin,
    const OptionalTensor& freqs_cos, const OptionalTensor& segment_ids, int64_t head_dim, double norm_eps,
    double rope_theta, c10::string_view rope_pairing, bool causal, std::optional<double> qk_scale,
    c10::string_view backend, int64_t window_left, int64_t window_right, double softcap, bool rope, at::Tensor& k_cache,
    at::Tensor& v_cache, const at::Tensor& lengths, const OptionalTensor& page_table, const OptionalTensor& positions,
    const OptionalTensor& draft_mask, int64_t split_keys, const OptionalTensor& k_scale, const OptionalTensor& v_scale);

}  // namespace selfattn
