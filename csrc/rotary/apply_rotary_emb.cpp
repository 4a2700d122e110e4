// apply_rotary_emb, and qk_norm_rope: per-head RMSNorm of q and k before it.
#include <ATen/TensorOperators.h>
#include <ATen/ops/rsqrt.h>
#include <torch/library.h>

#include <cmath>

#include "rotary/rotary.h"

namespace selfattn {
namespace {

void check_heads(const at::Tensor& x, const char* name) {
  TORCH_CHECK_TYPE(at::isFloatingType(x.scalar_type()), "selfattn: ", name, " must be floating point; got ",
                   x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() == 4, "selfattn: ", name, " must have four dimensions (B, S, N, D); got shape ",
                    x.sym_sizes());
}

std::tuple<at::Tensor, at::Tensor> apply_rotary_emb(const at::Tensor& xq, const at::Tensor& xk,
                                                    const OptionalTensor& freqs_sin, const OptionalTensor& freqs_cos,
                                                    double theta, c10::string_view pairing) {
  check_heads(xq, "xq");
  check_heads(xk, "xk");
  const RotaryPairing pairs = parse_pairing(pairing, "pairing");
  const auto [of_q, of_k] = choose_tables_of_both(xq, xk, freqs_sin, freqs_cos, std::nullopt, theta);
  return {rotate(xq, of_q, pairs).to(xq.scalar_type()), rotate(xk, of_k, pairs).to(xk.scalar_type())};
}

/// x / sqrt(mean(x^2) + eps) * weight over the last dimension (Root Mean Square Layer Normalization, arXiv:1910.07467,
/// eq. 4), in at least float32.
at::Tensor rms_norm(const at::Tensor& x, const OptionalTensor& weight, double eps, const char* name) {
  const auto dtype = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor heads = x.to(dtype);
  const at::Tensor normed = heads * at::rsqrt(heads.square().mean(-1, /*keepdim=*/true) + eps);
  if (!weight) return normed;
  TORCH_CHECK_TYPE(at::isFloatingType(weight->scalar_type()), "selfattn: ", name, " must be floating point; got ",
                   weight->scalar_type());
  TORCH_CHECK_VALUE(weight->dim() == 1 && weight->sym_size(0) == x.sym_size(3), "selfattn: ", name,
                    " must have the shape (D,) = [", x.sym_size(3), "]; got ", weight->sym_sizes());
  return normed * weight->to(dtype);
}

std::tuple<at::Tensor, at::Tensor> qk_norm_rope(const at::Tensor& q, const at::Tensor& k,
                                                const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                                                const OptionalTensor& freqs_sin, const OptionalTensor& freqs_cos,
                                                bool norm, double eps, bool rope, const OptionalTensor& positions,
                                                double theta, c10::string_view pairing) {
  check_heads(q, "q");
  check_heads(k, "k");
  const RotaryPairing pairs = parse_pairing(pairing, "pairing");
  TORCH_CHECK_VALUE(std::isfinite(eps) && eps >= 0.0, "selfattn: eps must be finite and at least 0; got ", eps);
  TORCH_CHECK_VALUE(norm || (!q_weight && !k_weight),
                    "selfattn: q_weight and k_weight must not be given where norm is False");
  TORCH_CHECK_VALUE(rope || (!freqs_sin && !freqs_cos && !positions),
                    "selfattn: freqs_sin, freqs_cos and positions must not be given where rope is False");
  RotaryTables of_q, of_k;
  if (rope) std::tie(of_q, of_k) = choose_tables_of_both(q, k, freqs_sin, freqs_cos, positions, theta);
  const auto prepare = [&](const at::Tensor& x, const OptionalTensor& weight, const char* weight_name,
                           const RotaryTables& tables) {
    at::Tensor heads = norm ? rms_norm(x, weight, eps, weight_name) : x;
    if (rope) heads = rotate(heads, tables, pairs);
    return heads.to(x.scalar_type());
  };
  return {prepare(q, q_weight, "q_weight", of_q), prepare(k, k_weight, "k_weight", of_k)};
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, CompositeImplicitAutograd, m) {
  m.impl("apply_rotary_emb", TORCH_FN(selfattn::apply_rotary_emb));
  m.impl("qk_norm_rope", TORCH_FN(selfattn::qk_norm_rope));
}
