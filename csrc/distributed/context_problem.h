#pragma once

#include <selfattn/backend.h>

#include <string>
#include <tuple>
#include <vector>

#include "attention/problem.h"
#include "distributed/rank_group.h"

namespace selfattn {

/// The arguments of context_parallel_attention as a schema has them.
struct ContextCall {
  at::Tensor q, k, v;
  at::Tensor kv_segment_ids, kv_positions;
  AttentionArguments attention;
  int64_t shared;
  int64_t group_size;
  std::string group_name;
  std::string method;
  std::string backend;
  int64_t local_start;
  bool documents_are_runs;
  std::string heads_group_name;
  int64_t heads_group_size;
  OptionalTensor kv_order;
};

/// What a forward pass gives: out (B, L, NH, DV) in q's dtype; what the backward pass takes of it: lse of the local
/// part (B, NH, L - local_start) and of the shared part, float32, and of a heads group two tensors for each group of
/// heads: q, k and v of h * shared tokens side by side as attention took them, (B, h * shared, F), and their out.
using ContextResults = std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>;

/// dq, dk, dv, dsinks; the last is empty without sinks.
using ContextGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

enum class ContextMethod { kHeads, kKeys };

/// One call, validated. Its attention is the sum of two parts, since every query has its keys in one of them: the local
/// part, tokens from `local_start` on with the ids of split documents masked, and the shared part, the first `shared`
/// tokens of every rank with those of whole documents masked.
///
/// The n ranks are a grid. Those of a heads group, whose numbers follow each other, exchange their shared tokens for
/// heads; those at the same place of every heads group, a keys group, gather the keys of these heads. The method kHeads
/// is one heads group, kKeys of a call without a heads group is one keys group.
struct ContextProblem {
  AttentionProblem own;  // this rank's tokens, with their ids and positions
  // Of the shared slots of all ranks, (B, n * shared): numbers of split documents, -1 but for these; positions as own
  // has them; which slot comes first, second, ... by number, -1 behind, and position, int64. The slots of a rank are in
  // that order where it is given.
  at::Tensor kv_ids;
  OptionalTensor kv_positions;
  OptionalTensor kv_order;
  int64_t shared;
  int64_t local_start;
  bool documents_are_runs;
  ContextMethod method;  // of the call's `group_name`
  Backend backend;
  RankGroup heads = {};
  RankGroup keys = {};

  c10::SymInt length() const { return own.query_length(); }
  /// Whether tokens of this rank lie in a part.
  bool has_local_part() const { return length() > local_start; }
  bool has_shared_part() const { return shared > 0; }
  /// Whether indices cannot stand for positions where the tokens of a document lie in their order, and side by side:
  /// other documents lay between them, and a window counts those.
  bool needs_positions() const { return own.has_positions() && own.has_window() && !documents_are_runs; }
  /// The number of this rank among all. Throws c10::ValueError where a group is of another size.
  int64_t rank() const { return keys.rank() * heads.size() + heads.rank(); }
  /// Of the query heads, and of the key heads, which are repeated where there are fewer than ranks of the heads group,
  /// those that a rank computes of shared tokens.
  c10::SymInt query_heads_of_rank() const { return own.query_heads() / heads.size(); }
  c10::SymInt key_heads_of_rank() const;
  /// In how many groups these heads travel and are computed, one after another, where results go back to other ranks: a
  /// group travels while another is computed.
  int64_t groups_of_heads() const;
  /// The call's attention of these tokens of this rank, with the ids and positions of all.
  AttentionProblem narrow_tokens(int64_t begin, int64_t end) const;
};

/// Throws c10::TypeError and c10::ValueError as make_attention_problem does. Nothing of the group is looked up.
ContextProblem make_context_problem(const ContextCall& call);

/// Throws where what the backward pass is given does not fit the call.
void check_context_gradients(const ContextProblem& problem, const at::Tensor& grad_out, const at::Tensor& out,
                             const at::Tensor& lse, const at::Tensor& shared_lse, at::TensorList exchanged);

/// The forward pass's results, not filled.
ContextResults empty_context_results(const ContextProblem& problem, at::Device device);

}  // namespace selfattn
