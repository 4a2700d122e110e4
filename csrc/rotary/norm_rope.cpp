// qk_norm_rope in ATen operators: per-head RMSNorm of q and k, then the rotary embedding; and its gradient.
#include "rotary/norm_rope.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/rsqrt.h>
#include <algorithm>
#include <cmath>
#include <limits>

#include "common/dense_tensor.h"
#include "common/function_transform.h"

namespace selfattn {
namespace {

void check_weight(const OptionalTensor& weight, const HeadsShape& heads, const char* name) {
  if (!weight) return;
  check_floating_point(*weight, name, heads.device, heads.name);
  TORCH_CHECK_VALUE(weight->dim() == 1 && weight->sym_size(0) == heads.head_dim, "selfattn: ", name,
                    " must have the shape (D,) = [", heads.head_dim, "]; got ", weight->sym_sizes());
}

/// Throws where x is not a floating point tensor of four dimensions (B, S, N, D).
void check_heads(const at::Tensor& x, const char* name) {
  check_floating_point(x, name);
  TORCH_CHECK_VALUE(x.dim() == 4, "selfattn: ", name, " must have four dimensions (B, S, N, D); got shape ",
                    x.sym_sizes());
}

double eps_of_heads(double eps, const at::Tensor& heads) {
  if (heads.scalar_type() == at::kDouble || eps == 0.0) return eps;
  return std::clamp<double>(eps, std::numeric_limits<float>::min(), std::numeric_limits<float>::max());
}

/// Throws where the table does not fit the heads. It may be narrower than they are: it rotates their first R elements.
void check_table(const at::Tensor& table, const HeadsShape& heads, const char* name) {
  check_floating_point(table, name, heads.device, heads.name);
  const auto sizes = table.sym_sizes();
  const bool fits = table.dim() == 3 && (sizes[0] == 1 || sizes[0] == heads.batch) && sizes[1] == heads.length &&
                    (sizes[2] * 2 == heads.head_dim || (sizes[2] > 0 && sizes[2] * 2 < heads.head_dim));
  TORCH_CHECK_VALUE(fits, "selfattn: ", name, " must have the shape (1 or B, S, R / 2) = (1 or ", heads.batch, ", ",
                    heads.length, ", 1 to ", heads.head_dim / 2, ") of ", heads.name, "; got ", sizes);
}

/// Throws where heads cannot be rotated by the call's tables, or by its positions and theta.
void check_rotation(const HeadsShape& heads, const NormRopeCall& call, const char* theta_name) {
  const OptionalTensor &sin = call.freqs_sin, &cos = call.freqs_cos, &positions = call.positions;
  TORCH_CHECK_VALUE(sin.has_value() == cos.has_value(),
                    "selfattn: freqs_sin and freqs_cos must be given together; got one alone");
  if (sin) {
    TORCH_CHECK_VALUE(!positions, "selfattn: positions must not be given beside freqs_sin and freqs_cos");
    check_table(*sin, heads, "freqs_sin");
    check_table(*cos, heads, "freqs_cos");
    TORCH_CHECK_VALUE(cos->sym_size(2) == sin->sym_size(2),
                      "selfattn: freqs_cos must have as many columns as freqs_sin, ", sin->sym_size(2), "; got shape ",
                      cos->sym_sizes());
    return;
  }
  TORCH_CHECK_VALUE(heads.head_dim % 2 == 0, "selfattn: ", heads.name,
                    " must have an even head dimension for the rotary embedding without tables; got ", heads.head_dim);
  check_theta(call.theta, theta_name);
  if (!positions) return;
  check_positions_dtype(*positions, "positions");
  check_device(*positions, "positions", heads.device, heads.name);
  TORCH_CHECK_VALUE(positions->dim() == 2 && positions->sym_size(1) == heads.length &&
                        (positions->sym_size(0) == 1 || positions->sym_size(0) == heads.batch),
                    "selfattn: positions must have the shape (1 or B, S) = (1 or ", heads.batch, ", ", heads.length,
                    ") of ", heads.name, "; got ", positions->sym_sizes());
}

HeadsShape shape_of(const at::Tensor& x, const char* name) {
  return {name, x.sym_size(0), x.sym_size(1), x.sym_size(3), x.device()};
}

void check_gradient(const at::Tensor& grad, const at::Tensor& x, const char* name, const char* of) {
  TORCH_CHECK_VALUE(x.defined(), "selfattn: ", of, " must be given where norm is True");
  check_heads(x, of);
  TORCH_CHECK_TYPE(grad.scalar_type() == x.scalar_type() && grad.device() == x.device(), "selfattn: ", name,
                   " must be ", x.scalar_type(), " on ", x.device(), "; got ", grad.scalar_type(), " on ",
                   grad.device());
  TORCH_CHECK_VALUE(grad.sym_sizes() == x.sym_sizes(), "selfattn: ", name, " must have the shape of ", of, ", ",
                    x.sym_sizes(), "; got ", grad.sym_sizes());
}

/// 1 / sqrt(mean(x^2) + eps) over the last dimension (Root Mean Square Layer Normalization, arXiv:1910.07467, eq. 4).
at::Tensor reciprocal_rms(const at::Tensor& x, double eps) {
  return at::rsqrt(x.square().mean(-1, /*keepdim=*/true) + eps);
}

at::Tensor weighted(const at::Tensor& x, const OptionalTensor& weight) {
  return weight ? x * weight->to(x.scalar_type()) : x;
}

at::Tensor no_gradient(const at::Tensor& grad) { return at::empty({0}, grad.options()); }

/// `heads` in the dtype of x, contiguous, in memory of its own.
at::Tensor as_result(const at::Tensor& heads, const at::Tensor& x) {
  const at::Tensor result = heads.to(x.scalar_type()).contiguous();
  return result.is_same(x) ? x.clone() : result;
}

/// (B, S, N, D) -> (D,), or (parts, D), the sum of each part of the batch.
at::Tensor sum_of_heads(const at::Tensor& heads, const std::optional<c10::SymInt>& parts) {
  if (!parts) return heads.sum(at::IntArrayRef{0, 1, 2});
  const auto sizes = heads.sym_sizes();
  const c10::SymInt batch = *parts == 0 ? c10::SymInt(0) : sizes[0] / *parts;
  return heads.reshape_symint({*parts, batch * sizes[1] * sizes[2], sizes[3]}).sum(1);
}

/// The gradients of one of the two: dx in its dtype, and of its weight.
std::pair<at::Tensor, at::Tensor> gradients_of_one(const NormRopeCall& call, const at::Tensor& grad,
                                                   const at::Tensor& x, const OptionalTensor& weight,
                                                   const RotaryTables& tables,
                                                   const std::optional<c10::SymInt>& parts) {
  const auto dtype = compute_dtype(grad);
  // A rotation's transpose rotates the other way.
  const at::Tensor rotated = call.rope ? rotate(grad, {-tables.sin, tables.cos}, call.pairing) : grad.to(dtype);
  if (!call.norm) return {as_result(rotated, grad), no_gradient(grad)};
  const at::Tensor heads = x.to(dtype);
  const at::Tensor rstd = reciprocal_rms(heads, call.eps), normed = heads * rstd;
  const at::Tensor of_normed = weighted(rotated, weight);
  const at::Tensor along = (of_normed * normed).mean(-1, /*keepdim=*/true);
  return {as_result(rstd * (of_normed - normed * along), grad),
          weight ? sum_of_heads(rotated * normed, parts).to(weight->scalar_type()) : no_gradient(grad)};
}

at::Tensor heads_of_one(const NormRopeCall& call, const at::Tensor& x, const OptionalTensor& weight,
                        const RotaryTables& tables) {
  at::Tensor heads = x.to(compute_dtype(x));
  if (call.norm) heads = weighted(heads * reciprocal_rms(heads, call.eps), weight);
  if (call.rope) heads = rotate(heads, tables, call.pairing);
  return as_result(heads, x);
}

/// The caller's tables, or those of `positions`, or of positions 0 .. S - 1, for a rotation of x.
RotaryTables tables_of(const NormRopeCall& call, const at::Tensor& x) {
  if (call.freqs_sin) return {*call.freqs_sin, *call.freqs_cos};
  const auto indices = x.options().dtype(at::kLong).requires_grad(false);
  return rotary_tables(call.positions ? *call.positions : at::arange(x.sym_size(1), indices),
                       x.sym_size(3).guard_int(__FILE__, __LINE__), call.theta);
}

/// Those of q and of k; computed once where both have the same batch, length, head dimension and device.
std::pair<RotaryTables, RotaryTables> tables_of(const NormRopeCall& call, const at::Tensor& q, const at::Tensor& k) {
  if (!call.rope) return {};
  const RotaryTables of_q = tables_of(call, q);
  const bool are_alike = q.device() == k.device() && q.sym_size(0) == k.sym_size(0) && q.sym_size(1) == k.sym_size(1) &&
                         q.sym_size(3) == k.sym_size(3);
  return {of_q, are_alike ? of_q : tables_of(call, k)};
}

}  // namespace

bool needs_composition(const NormRopeCall& call) {
  if (is_function_transform_active()) return true;
  if (any_requires_grad({call.freqs_sin, call.freqs_cos, call.positions})) return true;
  const OptionalTensor tensors[] = {call.q, call.k, call.q_weight, call.k_weight, call.freqs_sin, call.freqs_cos};
  return std::any_of(std::begin(tensors), std::end(tensors),
                     [](const OptionalTensor& tensor) { return tensor && has_tangent(*tensor); });
}

void check_norm_rope_options(const NormRopeCall& call, const HeadsShape& q, const HeadsShape& k,
                             const NormRopeNames& names) {
  TORCH_CHECK_VALUE(std::isfinite(call.eps) && call.eps >= 0.0, "selfattn: ", names.eps,
                    " must be finite and at least 0; got ", call.eps);
  TORCH_CHECK_VALUE(call.norm || (!call.q_weight && !call.k_weight), "selfattn: ", names.q_weight, " and ",
                    names.k_weight, " must not be given where norm is False");
  TORCH_CHECK_VALUE(call.rope || (!call.freqs_sin && !call.freqs_cos && !call.positions),
                    "selfattn: freqs_sin, freqs_cos and positions must not be given where rope is False");
  if (call.rope) {
    check_rotation(q, call, names.theta);
    check_rotation(k, call, names.theta);
  }
  check_weight(call.q_weight, q, names.q_weight);
  check_weight(call.k_weight, k, names.k_weight);
}

void validate(NormRopeCall& call, const NormRopeNames& names) {
  check_heads(call.q, names.q);
  check_heads(call.k, names.k);
  check_device(call.k, names.k, call.q.device(), names.q);
  check_norm_rope_options(call, shape_of(call.q, names.q), shape_of(call.k, names.k), names);
  call.eps = eps_of_heads(call.eps, call.q);
}

void validate(NormRopeCall& call, const at::Tensor& grad_q, const at::Tensor& grad_k) {
  check_heads(grad_q, "grad_q");
  check_heads(grad_k, "grad_k");
  check_device(grad_k, "grad_k", grad_q.device(), "grad_q");
  if (call.norm || call.q.defined()) check_gradient(grad_q, call.q, "grad_q", "q");
  if (call.norm || call.k.defined()) check_gradient(grad_k, call.k, "grad_k", "k");
  check_norm_rope_options(call, shape_of(grad_q, "grad_q"), shape_of(grad_k, "grad_k"));
  call.eps = eps_of_heads(call.eps, grad_q);
}

void check_contiguous(const at::Tensor& grad_q, const at::Tensor& grad_k) {
  TORCH_CHECK_VALUE(grad_q.is_contiguous(), "selfattn: grad_q must be contiguous; got strides ", grad_q.sym_strides());
  TORCH_CHECK_VALUE(grad_k.is_contiguous(), "selfattn: grad_k must be contiguous; got strides ", grad_k.sym_strides());
}

NormRopeHeads compose_norm_rope(const NormRopeCall& call) {
  const auto [of_q, of_k] = tables_of(call, call.q, call.k);
  return {heads_of_one(call, call.q, call.q_weight, of_q), heads_of_one(call, call.k, call.k_weight, of_k)};
}

NormRopeGradients compose_norm_rope_backward(const NormRopeCall& call, const at::Tensor& grad_q,
                                             const at::Tensor& grad_k, const std::optional<c10::SymInt>& parts) {
  const auto [of_q, of_k] = tables_of(call, grad_q, grad_k);
  auto [dq, dq_weight] = gradients_of_one(call, grad_q, call.q, call.q_weight, of_q, parts);
  auto [dk, dk_weight] = gradients_of_one(call, grad_k, call.k, call.k_weight, of_k, parts);
  return {dq, dk, dq_weight, dk_weight};
}

NormRopeGradients compose_norm_rope_backward(const NormRopeCall& call, const at::Tensor& grad_q,
                                             const at::Tensor& grad_k) {
  return compose_norm_rope_backward(call, grad_q, grad_k, std::nullopt);
}

NormRopeWeightGradients copy_norm_rope_backward(const NormRopeCall& call, at::Tensor& grad_q, at::Tensor& grad_k) {
  const auto [dq, dk, dq_weight, dk_weight] = qk_norm_rope_backward(call, grad_q, grad_k);
  grad_q.copy_(dq);
  grad_k.copy_(dk);
  return {dq_weight, dk_weight};
}

}  // namespace selfattn

// Any device without kernels.
TORCH_LIBRARY_IMPL(selfattn, CompositeExplicitAutograd, m) {
  using namespace selfattn;
  register_norm_rope<compose_norm_rope, compose_norm_rope_backward, copy_norm_rope_backward>(m);
}
