#include "kv_cache/gather.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/where.h>

#include "kv_cache/positions.h"

namespace selfattn {
namespace {

/// Whether each query may see each slot of its own row: (R, Sq, L), with ids (1, B * Sq, L).
struct OwnRow {
  at::Tensor positions;  // (R, Sq), (1, B * Sq)
  at::Tensor lengths;    // (R, 1), (1, B * Sq): of the query's row
};

OwnRow own_rows(const KvCacheProblem& problem) {
  const at::Tensor positions = kv_cache_positions(problem.lengths, problem.segment_ids, problem.query_length(),
                                                  problem.capacity(), problem.positions);
  const at::Tensor lengths = problem.lengths.to(at::kLong);
  if (!problem.segment_ids) return {positions, lengths.unsqueeze(1)};
  const at::Tensor ids = problem.segment_ids->reshape({-1}).clamp(0);
  return {positions.reshape({1, -1}), lengths.index_select(0, ids).unsqueeze(0)};
}

/// The draft mask (R, Sq, Sq) at the last Sq slots of each row, in the place of what `allowed` (R, Sq, L) says there.
at::Tensor with_draft_mask(const KvCacheProblem& problem, const at::Tensor& allowed, const at::Tensor& slots) {
  const c10::SymInt drafts = problem.query_length();
  if (drafts == 0) return allowed;
  const at::Tensor draft = slots - (problem.lengths.to(at::kLong).unsqueeze(1) - drafts);  // (R, L)
  const at::Tensor column = draft.clamp(0, at::Scalar(drafts - 1)).unsqueeze(1).expand_symint(allowed.sym_sizes());
  return at::where((draft >= 0).unsqueeze(1), problem.draft_mask->gather(2, column), allowed);
}

at::Tensor slots_in_own_row(const KvCacheProblem& problem) {
  const OwnRow own = own_rows(problem);
  const at::Tensor position = own.positions.unsqueeze(2);
  const at::Tensor slots = at::arange(problem.capacity(), position.options());  // (L,)
  const at::Tensor is_filled = at::logical_and(slots < own.lengths.unsqueeze(2), position >= 0);
  at::Tensor allowed = problem.is_causal ? slots <= position : at::logical_and(position >= 0, slots >= 0);
  if (problem.draft_mask) allowed = with_draft_mask(problem, allowed, slots);
  allowed = at::logical_and(allowed, is_filled);
  if (problem.window_left >= 0) allowed = at::logical_and(allowed, slots >= position - problem.window_left);
  if (problem.window_right >= 0) allowed = at::logical_and(allowed, slots <= position + problem.window_right);
  return allowed;
}

/// (1, B * Sq, L) -> (1, B * Sq, R, L): in each row, of which the query's own may have some.
at::Tensor slots_in_every_row(const KvCacheProblem& problem, const at::Tensor& in_own_row) {
  const at::Tensor ids = problem.segment_ids->reshape({1, -1, 1});
  const at::Tensor is_own = ids == at::arange(problem.rows(), ids.options());  // (1, B * Sq, R)
  return at::logical_and(is_own.unsqueeze(3), in_own_row.unsqueeze(2));
}

/// The slots of every row in order, (R, L, NKV, D).
at::Tensor gather_slots(const KvCacheProblem& problem, const at::Tensor& cache, const OptionalTensor& pages,
                        const at::Tensor& is_used) {
  const at::Tensor paged = pages ? cache.index_select(0, pages->reshape({-1})) : cache;
  const at::Tensor slots =
      paged.reshape_symint({problem.rows(), problem.capacity(), problem.key_heads(), cache.sym_size(3)});
  return at::where(is_used.unsqueeze(2).unsqueeze(3), slots, 0.0);
}

/// (R, L) -> (R, pages of a row).
at::Tensor pages_in_use(const KvCacheProblem& problem, const at::Tensor& is_used) {
  return is_used.reshape_symint({problem.rows(), problem.pages_per_row(), problem.page_size()}).any(2);
}

}  // namespace

GatheredProblem gather(const KvCacheProblem& problem) {
  const bool is_ragged = problem.segment_ids.has_value();
  at::Tensor allowed = slots_in_own_row(problem);
  if (is_ragged) allowed = slots_in_every_row(problem, allowed);
  const at::Tensor is_used = is_ragged ? allowed.any(1).squeeze(0) : allowed.any(1);  // (R, L)
  OptionalTensor pages;
  if (problem.page_table) {
    pages = kv_cache_pages(*problem.page_table, pages_in_use(problem, is_used), problem.pages());
  }
  at::Tensor query = problem.query;
  at::Tensor key = gather_slots(problem, problem.key, pages, is_used);
  at::Tensor value = gather_slots(problem, problem.value, pages, is_used);
  if (is_ragged) {
    query = query.flatten(0, 1).unsqueeze(0);
    key = key.flatten(0, 1).unsqueeze(0);
    value = value.flatten(0, 1).unsqueeze(0);
    allowed = allowed.flatten(2, 3);
  }
  return {{.query = query,
           .key = key,
           .value = value,
           .sinks = problem.sinks,
           .is_causal = false,
           .scale = problem.scale,
           .softcap = problem.softcap,
           .needs_lse = problem.needs_lse},
          allowed.unsqueeze(1)};
}

AttentionResults scatter_results(const KvCacheProblem& problem, const AttentionResults& results) {
  if (!problem.segment_ids) return results;
  const auto& [out, lse] = results;
  const c10::SymInt batch = problem.batch(), length = problem.query_length(), heads = problem.query_heads();
  return {out.view_symint({batch, length, heads, problem.value_head_dim()}),
          lse.defined() ? lse.view_symint({heads, batch, length}).transpose(0, 1).contiguous() : lse};
}

}  // namespace selfattn
