#pragma once

#include <torch/library.h>

#include <tuple>
#include <type_traits>

#include "common/dispatch.h"
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
  OptionalTensor freqs_sin = std::nullopt;  // (1 or B, S, R / 2): the first R elements of a head rotate
  OptionalTensor freqs_cos = std::nullopt;  // (1 or B, S, R / 2)
  bool norm = true;
  double eps = 1e-6;
  bool rope = true;
  OptionalTensor positions = std::nullopt;  // (1 or B, S)
  double theta = 10000.0;
  RotaryPairing pairing = RotaryPairing::kInterleaved;

  /// apply(tensor) of each tensor, of either kind.
  template <typename Apply>
  void for_each_tensor(const Apply& apply) {
    apply(q), apply(k), apply(q_weight), apply(k_weight), apply(freqs_sin), apply(freqs_cos), apply(positions);
  }
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

/// Heads (B, S, N, D), which need not be there yet, as the checks see them.
struct HeadsShape {
  const char* name;  // of the argument that they come from, for messages
  c10::SymInt batch, length, head_dim;
  at::Device device;
};

/// All of `validate` but what q and k themselves are, for heads of these shapes.
void check_norm_rope_options(const NormRopeCall& call, const HeadsShape& q, const HeadsShape& k,
                             const NormRopeNames& names = {});

/// Throws c10::TypeError or c10::ValueError where the call is not valid; each message names the argument, what was
/// expected and what came. For heads that are computed in float32, brings eps to what float32 can hold: 0 stays 0, and
/// nothing else becomes it.
void validate(NormRopeCall& call, const NormRopeNames& names = {});

/// The same for the gradient: grad_q and grad_k are of the results' shapes and dtypes.
void validate(NormRopeCall& call, const at::Tensor& grad_q, const at::Tensor& grad_k);

/// Throws where the gradients are not memory that theirs can be written into.
void check_contiguous(const at::Tensor& grad_q, const at::Tensor& grad_k);

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

/// dq_weight, dk_weight
using NormRopeWeightGradients = std::tuple<at::Tensor, at::Tensor>;

/// The operators qk_norm_rope, qk_norm_rope_backward and qk_norm_rope_backward.in_place: the only place in C++ where
/// their arguments are listed. `Heads`: of q and k, which a gradient may lack. `Gradients`: grad_q and grad_k, or none.
template <typename Result, typename Heads, typename... Gradients>
struct NormRopeOp {
  static constexpr bool kIsInPlace = (std::is_same_v<Gradients, at::Tensor&> || ...);

  /// An implementation with the arguments of the schema, which can be registered. It validates the call.
  template <Result (*kImplementation)(const NormRopeCall&, Gradients...)>
  static Result from_schema(Gradients... gradients, const Heads& q, const Heads& k, const OptionalTensor& q_weight,
                            const OptionalTensor& k_weight, const OptionalTensor& freqs_sin,
                            const OptionalTensor& freqs_cos, bool norm, double eps, bool rope,
                            const OptionalTensor& positions, double theta, c10::string_view pairing) {
    NormRopeCall call{as_saved(q), as_saved(k), q_weight, k_weight,  freqs_sin, freqs_cos,
                      norm,        eps,         rope,     positions, theta,     parse_pairing(pairing, "pairing")};
    validate(call, gradients...);
    if constexpr (kIsInPlace) check_contiguous(gradients...);
    return kImplementation(call, gradients...);
  }

  /// Through the dispatcher.
  static Result call(const NormRopeCall& call, Gradients... gradients) {
    static const auto op = find_op<decltype(from_schema<nullptr>)>(
        sizeof...(Gradients) == 0 ? "selfattn::qk_norm_rope" : "selfattn::qk_norm_rope_backward",
        kIsInPlace ? "in_place" : "");
    const auto heads = [](const at::Tensor& x) -> Heads {
      if constexpr (std::is_same_v<Heads, at::Tensor>) {
        return x;
      } else {
        return as_optional(x);
      }
    };
    return op.call(gradients..., heads(call.q), heads(call.k), call.q_weight, call.k_weight, call.freqs_sin,
                   call.freqs_cos, call.norm, call.eps, call.rope, call.positions, call.theta, to_string(call.pairing));
  }
};

using NormRope = NormRopeOp<NormRopeHeads, at::Tensor>;
using NormRopeBackward = NormRopeOp<NormRopeGradients, OptionalTensor, const at::Tensor&, const at::Tensor&>;
/// dq and dk take the memory of grad_q and grad_k, which are contiguous. Not differentiable.
using NormRopeBackwardInPlace = NormRopeOp<NormRopeWeightGradients, OptionalTensor, at::Tensor&, at::Tensor&>;

inline NormRopeHeads qk_norm_rope(const NormRopeCall& call) { return NormRope::call(call); }
inline NormRopeGradients qk_norm_rope_backward(const NormRopeCall& call, const at::Tensor& grad_q,
                                               const at::Tensor& grad_k) {
  return NormRopeBackward::call(call, grad_q, grad_k);
}

/// qk_norm_rope_backward.in_place through qk_norm_rope_backward: for what has no kernel that works in place.
NormRopeWeightGradients copy_norm_rope_backward(const NormRopeCall& call, at::Tensor& grad_q, at::Tensor& grad_k);

/// Registers a device's kernels.
template <NormRopeHeads (*kForward)(const NormRopeCall&),
          NormRopeGradients (*kBackward)(const NormRopeCall&, const at::Tensor&, const at::Tensor&),
          NormRopeWeightGradients (*kBackwardInPlace)(const NormRopeCall&, at::Tensor&, at::Tensor&)>
void register_norm_rope(torch::Library& library) {
  library.impl("qk_norm_rope", TORCH_FN(NormRope::from_schema<kForward>));
  library.impl("qk_norm_rope_backward", TORCH_FN(NormRopeBackward::from_schema<kBackward>));
  library.impl("qk_norm_rope_backward.in_place", TORCH_FN(NormRopeBackwardInPlace::from_schema<kBackwardInPlace>));
}

}  // namespace selfattn
