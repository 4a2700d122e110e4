#pragma once

#include "common/dense_tensor.h"
#include "common/dispatch.h"
#include "kv_cache/problem.h"
#include "rotary/norm_rope.h"

// append_kv_cache and qk_norm_rope_append: the only place in C++ where their arguments are listed.

namespace selfattn {

/// Keys and values of tokens, and the slots that they are written to; validated in everything but the values of its
/// integers. Row and slot are those of KvCacheProblem; a token of a negative id is not written. No two tokens of a call
/// may have the same slot.
struct AppendCall {
  at::Tensor key;        // (B, S, NKV, DQK)
  at::Tensor value;      // (B, S, NKV, DV)
  at::Tensor positions;  // (B, S) int32 or int64: a slot of the row, from 0 to its capacity - 1
  OptionalTensor page_table;
  OptionalTensor segment_ids;
  at::Tensor key_cache;    // (P, page_size, NKV, DQK), any strides, written
  at::Tensor value_cache;  // (P, page_size, NKV, DV), any strides, written
};

/// The same after norm and rotation of q and of the keys, which are norm_rope.k.
struct NormRopeAppendCall {
  NormRopeCall norm_rope;
  AppendCall append;
};

/// Throws as make_kv_cache_problem does.
AppendCall make_append_call(const at::Tensor& k, const at::Tensor& v, const at::Tensor& positions,
                            const OptionalTensor& page_table, const OptionalTensor& segment_ids,
                            const at::Tensor& k_cache, const at::Tensor& v_cache, const OptionalTensor& k_scale,
                            const OptionalTensor& v_scale);

template <void (*kImplementation)(const AppendCall&)>
void append_from_schema(const at::Tensor& k, const at::Tensor& v, const at::Tensor& positions,
                        const OptionalTensor& page_table, const OptionalTensor& segment_ids, at::Tensor& k_cache,
                        at::Tensor& v_cache, const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  kImplementation(make_append_call(k, v, positions, page_table, segment_ids, k_cache, v_cache, k_scale, v_scale));
}

/// The operators in ATen operators, for what kernels do not serve.
void compose_append(const AppendCall& call);
at::Tensor compose_norm_rope_append(const NormRopeAppendCall& call);

/// Through the dispatcher.
inline void append_kv_cache(AppendCall call) {
  static const auto op = find_op<decltype(append_from_schema<nullptr>)>("selfattn::append_kv_cache");
  op.call(call.key, call.value, call.positions, call.page_table, call.segment_ids, call.key_cache, call.value_cache,
          /*k_scale=*/std::nullopt, /*v_scale=*/std::nullopt);
}

/// Gives the normalised and rotated q (B, S, NH, DQK), contiguous.
template <at::Tensor (*kImplementation)(const NormRopeAppendCall&)>
at::Tensor norm_rope_append_from_schema(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                        const at::Tensor& positions, const OptionalTensor& page_table,
                                        const OptionalTensor& segment_ids, const OptionalTensor& q_weight,
                                        const OptionalTensor& k_weight, const OptionalTensor& freqs_sin,
                                        const OptionalTensor& freqs_cos, at::Tensor& k_cache, at::Tensor& v_cache,
                                        bool norm, double eps, bool rope, double theta, c10::string_view pairing,
                                        const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  const AppendCall append =
      make_append_call(k, v, positions, page_table, segment_ids, k_cache, v_cache, k_scale, v_scale);
  check_dtype(q, "q", k.scalar_type(), "k");
  // Tables say how far a token is rotated; its slot does where there are none.
  NormRopeCall norm_rope{q,         k,
                         q_weight,  k_weight,
                         freqs_sin, freqs_cos,
                         norm,      eps,
                         rope,      rope && !freqs_sin ? OptionalTensor(positions) : std::nullopt,
                         theta,     parse_pairing(pairing, "pairing")};
  validate(norm_rope);
  return kImplementation({norm_rope, append});
}

/// Through the dispatcher.
inline at::Tensor qk_norm_rope_append(NormRopeAppendCall call) {
  static const auto op = find_op<decltype(norm_rope_append_from_schema<nullptr>)>("selfattn::qk_norm_rope_append");
  auto& [norm_rope, append] = call;
  return op.call(norm_rope.q, append.key, append.value, append.positions, append.page_table, append.segment_ids,
                 norm_rope.q_weight, norm_rope.k_weight, norm_rope.freqs_sin, norm_rope.freqs_cos, append.key_cache,
                 append.value_cache, norm_rope.norm, norm_rope.eps, norm_rope.rope, norm_rope.theta,
                 to_string(norm_rope.pairing), /*k_scale=*/std::nullopt, /*v_scale=*/std::nullopt);
}

}  // namespace selfattn
