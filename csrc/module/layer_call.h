#pragma once

#include <tuple>

#include "attention/problem.h"
#include "rotary/norm_rope.h"

// What the layer's operators check, with and without a cache, and what they hand on.

namespace selfattn {

/// (B, S, N * head_dim) -> (B, S, N, head_dim).
inline at::Tensor split_heads(const at::Tensor& projected, int64_t head_dim) {
  return projected.unflatten_symint(2, {projected.sym_size(2) / head_dim, head_dim});
}

void check_head_dim(int64_t head_dim);

/// x (B, S, E) in the dtype of the weights, unless autocast is on.
void check_input(const at::Tensor& x, const at::Tensor& q_weight);

/// The query heads of checked projections of x.
c10::SymInt check_projections(const at::Tensor& x, const at::Tensor& q_weight, const at::Tensor& k_weight,
                              const at::Tensor& v_weight, const OptionalTensor& q_bias, const OptionalTensor& k_bias,
                              const OptionalTensor& v_bias, int64_t head_dim);

void check_output_projection(const at::Tensor& out_weight, const OptionalTensor& out_bias, const at::Tensor& x,
                             const at::Tensor& q_weight);

/// Throws where q (B, S, heads * head_dim) and k, v (B, S, kv_heads * head_dim) are no projections of one input.
void check_projected(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t head_dim);

/// What a layer does between its projections, beside the tensors that it projects.
struct LayerCall {
  NormRopeCall norm_rope;  // q and k come later
  AttentionArguments arguments;
  c10::string_view backend;
  int64_t head_dim;
};

/// Everything but the projections is checked. `x`: the tensor, of batch size B and length S, that the others are
/// compared with, called `x_name`.
LayerCall make_layer_call(const at::Tensor& x, const char* x_name, const c10::SymInt& heads,
                          const OptionalTensor& q_norm_weight, const OptionalTensor& k_norm_weight,
                          const OptionalTensor& sinks, const OptionalTensor& freqs_sin, const OptionalTensor& freqs_cos,
                          const OptionalTensor& segment_ids, int64_t head_dim, double norm_eps, double rope_theta,
                          c10::string_view rope_pairing, bool causal, std::optional<double> qk_scale,
                          c10::string_view backend, int64_t window_left, int64_t window_right, double softcap,
                          bool rope);

}  // namespace selfattn
