#pragma once

#include <ATen/core/ivalue.h>
#include <c10/core/SymInt.h>
#include <c10/util/flat_hash_map.h>

#include <string>
#include <vector>

#include "common/optional_tensor.h"

namespace selfattn {

/// The type of AutogradContext::saved_data.
using SavedNumbers = ska::flat_hash_map<std::string, at::IValue>;

/// One attention call, validated: the value that backends are chosen for and called with.
///
/// Lengths and head counts are symbolic integers, so that a call traced with dynamic shapes stays dynamic.
struct AttentionProblem {
  at::Tensor query;  // (B, Sq, NH, DQK)
  at::Tensor key;    // (B, Skv, NKV, DQK)
  at::Tensor value;  // (B, Skv, NKV, DV)
  // Both or neither are given; int32, on CUDA both may be int64 instead. Negative ids are padding.
  OptionalTensor query_segment_ids = std::nullopt;  // (B, Sq)
  OptionalTensor key_segment_ids = std::nullopt;    // (B, Skv)
  OptionalTensor sinks = std::nullopt;              // (NH,)
  // What causality and windows compare in the place of indices; both or neither are given, and neither where no rule
  // reads them. int32.
  OptionalTensor query_positions = std::nullopt;  // (B, Sq)
  OptionalTensor key_positions = std::nullopt;    // (B, Skv)
  // With positions: whether the tokens of either side stand by id, padding behind the others, then by position.
  bool is_in_order = false;
  bool is_causal = true;
  double scale = 1.0;
  int64_t window_left = -1;   // -1: unbounded
  int64_t window_right = -1;  // -1: unbounded
  double softcap = 0.0;       // 0: none
  bool needs_lse = false;     // the caller wants the logsumexp as a differentiable output

  c10::SymInt batch() const { return query.sym_size(0); }
  c10::SymInt query_length() const { return query.sym_size(1); }
  c10::SymInt key_length() const { return key.sym_size(1); }
  c10::SymInt query_heads() const { return query.sym_size(2); }
  c10::SymInt key_heads() const { return key.sym_size(2); }
  c10::SymInt head_dim() const { return query.sym_size(3); }
  c10::SymInt value_head_dim() const { return value.sym_size(3); }

  bool has_segments() const { return query_segment_ids.has_value(); }
  bool has_positions() const { return query_positions.has_value(); }
  bool has_window() const { return window_left >= 0 || window_right >= 0; }
  bool requires_grad() const;

  /// apply(tensor) of each tensor, of either kind.
  template <typename Apply>
  void for_each_tensor(const Apply& apply) {
    apply(query), apply(key), apply(value), apply(query_segment_ids), apply(key_segment_ids), apply(sinks);
    apply(query_positions), apply(key_positions);
  }

  /// For an autograd node, what the call's gradient is made of: puts the numbers into the node's data and gives the
  /// tensors, undefined where there is none, as the first ones for the node to save.
  std::vector<at::Tensor> save(SavedNumbers& numbers) const;
  /// The call again, of the tensors that the node saved; only `needs_lse` is forgotten.
  static AttentionProblem restore(at::TensorList saved, const SavedNumbers& numbers);
  static constexpr size_t kSavedTensors = 8;
};

/// What a caller may leave out, as the operators' schemas have it.
struct AttentionArguments {
  OptionalTensor segment_ids;
  bool is_causal = true;
  std::optional<double> qk_scale;
  OptionalTensor kv_segment_ids;
  int64_t window_left = -1;
  int64_t window_right = -1;
  double softcap = 0.0;
  OptionalTensor sinks;
  OptionalTensor positions;
  OptionalTensor kv_positions;
  bool in_order = false;
};

// What a problem holds of the numbers that a caller gives: those that are far beyond any effect are brought to ones
// that every rule and float32 can hold.
/// 1 / sqrt(DQK) where not given. query (B, Sq, NH, DQK).
double scale_of(const at::Tensor& query, std::optional<double> qk_scale, double softcap);
int64_t window_of(int64_t window);

// The checks of make_attention_problem that need no q, k and v yet. `owner` is the argument that the caller knows the
// tokens and the device by, for the message.
void check_attention_numbers(const AttentionArguments& arguments);
/// `tokens`: (B, S, ...). For segment ids and for positions.
void check_token_integers(const at::Tensor& integers, const char* name, const at::Tensor& tokens, const char* owner);
void check_sinks(const at::Tensor& sinks, const c10::SymInt& heads, const at::Device& device, const char* owner);

/// Validates a call and fills in the defaults (scale 1/sqrt(DQK), key ids = query ids, key positions = query
/// positions). Narrows int64 ids and positions, behind a check that they fit, where the device's kernels do not read
/// them; brings numbers that are far beyond any effect to ones that every rule and float32 can hold. Throws
/// c10::TypeError for a wrong dtype, device or layout, c10::ValueError for a wrong rank, shape or number; each message
/// names the argument, what was expected and what came.
AttentionProblem make_attention_problem(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                        const AttentionArguments& arguments, bool needs_lse = false);

}  // namespace selfattn
