#pragma once

#include <tuple>

#include "rotary/rotary.h"

namespace selfattn {

/// One call of qk_norm_rope, validated.
struct NormRopeCall {
  // Undefined only in the gradient of a call without norm, which does not need them.
  at::Tensor q;                            // (B, S, NH, D)
  at::Tensor k;                            // (B, S, NKV, D)
  OptionalTensor q_weight = std::nullopt;  // (D,)
  OptionalTensor k_weight = std::nullopt;  // (D,)
  // Both tables, or positions, or nothing: positions 0 .. S - 1.
  OptionalTensor freqs_sin = std::nullopt;  // (1 or B, S, D / 2)
  OptionalTensor freqs_cos = std::nullopt;  // (1 or B, S, D / 2)
  bool norm = true;
  double eps = 1e-6;
  bool rope = true;
  OptionalTensor positions = std::nullopt;  // (1 or B, S)
  double theta = 10000.0;
  RotaryPairing pairing = RotaryPairing::kInterleaved;
};

/// The names under which a caller knows these arguments, for messages. The others have one name everywhere.
struct NormRopeNames {
  const char *q = "q", *k = "k", *q_weight = "q_weight", *k_weight = "k_weight";
  const char *eps = "eps", *theta = "theta";
};

using NormRopeHeads = std::tuple<at::Tensor, at::Tensor>;
/// dq, dk, dq_weight, dk_weight; the gradient of a weight that is not there has no elements.
using NormRopeGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

/// Transforms, forward-mode tangents and tables that want a gradient: only ATen's operators serve them.
bool needs_composition(const NormRopeCall& call);

/// Throws where x is not a floating point tensor of four dimensions (B, S, N, D).
void check_heads(const at::Tensor& x, const char* name);

/// Throws c10::TypeError or c10::ValueError where the call is not valid; each message names the argument, what was
/// expected and what came.
void check_norm_rope(const NormRopeCall& call, const NormRopeNames& names = {});

/// All of it but q and k themselves, for heads of these shapes.
void check_norm_rope_options(const NormRopeCall& call, const HeadsShape& q, const HeadsShape& k,
                             const NormRopeNames& names = {});

/// The same for the gradient: grad_q and grad_k are of the results' shapes and dtypes.
void check_norm_rope_backward(const NormRopeCall& call, const at::Tensor& grad_q, const at::Tensor& grad_k);

/// The operator in ATen operators, differentiable any number of times in every argument and under every transform: for
/// what the kernels do not serve, and the formula that they are tested against. Computes in float32, or float64 for
/// float64. Results are contiguous.
NormRopeHeads compose_norm_rope(const NormRopeCall& call);

/// Its gradient, likewise.
NormRopeGradients compose_norm_rope_backward(const NormRopeCall& call, const at::Tensor& grad_q,
                                             const at::Tensor& grad_k);

/// The same with the weights' gradients of each of `parts` equal parts of the batch, (parts, D). Here and in
/// compose_norm_rope a weight may also be (B, 1, 1, D), one of each row.
NormRopeGradients compose_norm_rope_backward(const NormRopeCall& call, const at::Tensor& grad_q,
                                             const at::Tensor& grad_k, const std::optional<c10::SymInt>& parts);

/// selfattn::qk_norm_rope and selfattn::qk_norm_rope_backward through the dispatcher.
NormRopeHeads qk_norm_rope(const NormRopeCall& call);
NormRopeGradients qk_norm_rope_backward(const NormRopeCall& call, const at::Tensor& grad_q, const at::Tensor& grad_k);

/// dq_weight, dk_weight
using NormRopeWeightGradients = std::tuple<at::Tensor, at::Tensor>;

/// selfattn::qk_norm_rope_backward.in_place through the dispatcher: dq and dk take the memory of grad_q and grad_k,
/// which are contiguous. Not differentiable.
NormRopeWeightGradients qk_norm_rope_backward_in_place(const NormRopeCall& call, at::Tensor& grad_q,
                                                       at::Tensor& grad_k);

/// `eps` as float32 can hold it, for heads that are computed in float32: 0 stays 0, and nothing else becomes it.
double eps_of_heads(double eps, const at::Tensor& heads);

/// That operator through the one that gives tensors of its own: for what has no kernel that works in place.
NormRopeWeightGradients copy_norm_rope_backward(const NormRopeCall& call, at::Tensor& grad_q, at::Tensor& grad_k);

/// An implementation of the operator with the arguments of its schema.
template <NormRopeHeads (*kImplementation)(const NormRopeCall&)>
NormRopeHeads from_schema(const at::Tensor& q, const at::Tensor& k, const OptionalTensor& q_weight,
                          const OptionalTensor& k_weight, const OptionalTensor& freqs_sin,
                          const OptionalTensor& freqs_cos, bool norm, double eps, bool rope,
                          const OptionalTensor& positions, double theta, c10::string_view pairing) {
  NormRopeCall call{q,    k,   q_weight, k_weight,  freqs_sin, freqs_cos,
                    norm, eps, rope,     positions, theta,     parse_pairing(pairing, "pairing")};
  check_norm_rope(call);
  call.eps = eps_of_heads(eps, q);
  return kImplementation(call);
}

/// The same call, validated as one whose gradient is asked for.
NormRopeCall make_backward_call(NormRopeCall call, const at::Tensor& grad_q, const at::Tensor& grad_k);

/// The same for the gradient.
template <NormRopeGradients (*kImplementation)(const NormRopeCall&, const at::Tensor&, const at::Tensor&)>
NormRopeGradients backward_from_schema(const at::Tensor& grad_q, const at::Tensor& grad_k, const OptionalTensor& q,
                                       const OptionalTensor& k, const OptionalTensor& q_weight,
                                       const OptionalTensor& k_weight, const OptionalTensor& freqs_sin,
                                       const OptionalTensor& freqs_cos, bool norm, double eps, bool rope,
                                       const OptionalTensor& positions, double theta, c10::string_view pairing) {
  const NormRopeCall call = make_backward_call({as_saved(q), as_saved(k), q_weight, k_weight, freqs_sin, freqs_cos,
                                                norm, eps, rope, positions, theta, parse_pairing(pairing, "pairing")},
                                               grad_q, grad_k);
  return kImplementation(call, grad_q, grad_k);
}

/// The same for the gradient in place.
template <NormRopeWeightGradients (*kImplementation)(const NormRopeCall&, at::Tensor&, at::Tensor&)>
NormRopeWeightGradients backward_in_place_from_schema(at::Tensor& grad_q, at::Tensor& grad_k, const OptionalTensor& q,
                                                      const OptionalTensor& k, const OptionalTensor& q_weight,
                                                      const OptionalTensor& k_weight, const OptionalTensor& freqs_sin,
                                                      const OptionalTensor& freqs_cos, bool norm, double eps, bool rope,
                                                      const OptionalTensor& positions, double theta,
                                                      c10::string_view pairing) {
  const NormRopeCall call = make_backward_call({as_saved(q), as_saved(k), q_weight, k_weight, freqs_sin, freqs_cos,
                                                norm, eps, rope, positions, theta, parse_pairing(pairing, "pairing")},
                                               grad_q, grad_k);
  TORCH_CHECK_VALUE(grad_q.is_contiguous(), "selfattn: grad_q must be contiguous; got strides ", grad_q.sym_strides());
  TORCH_CHECK_VALUE(grad_k.is_contiguous(), "selfattn: grad_k must be contiguous; got strides ", grad_k.sym_strides());
  return kImplementation(call, grad_q, grad_k);
}

}  // namespace selfattn
