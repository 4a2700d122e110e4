#pragma once

#include "attention/problem.h"

namespace selfattn {

/// One call of attention over a KV cache, validated in everything but the values of its integers.
///
/// Notation: R rows of the cache, each a sequence; P pages of `page_size` slots, a slot for the key and the value of
/// one token. Slot s of row r lies in page page_table[r, s / page_size], or without a table in page r. A query of row r
/// sits at a slot, its position, and may attend to a slot s where every rule holds:
/// - s < lengths[r], and the position is not negative;
/// - causal: s <= position, except in the last Sq slots of the row where there is a draft mask, which says it there;
/// - windows: position - window_left <= s <= position + window_right.
/// What no rule lets a query see is never used, whatever stands there: slots, whole pages and entries of the table.
struct KvCacheProblem {
  at::Tensor query;    // (B, Sq, NH, DQK)
  at::Tensor key;      // (P, page_size, NKV, DQK), any strides
  at::Tensor value;    // (P, page_size, NKV, DV), any strides
  at::Tensor lengths;  // (R,) int32 or int64: slots in use, those of this call's tokens included
  // (R, pages of a row) int32 or int64; none: P == R, page r is row r.
  OptionalTensor page_table = std::nullopt;
  // (B, Sq) int32 or int64: the row of each query; a negative one belongs to none. None: B == R, query b is of row b.
  OptionalTensor segment_ids = std::nullopt;
  // (B, Sq) int32 or int64, values that fit in int32. None: a query of row r is at lengths[r] - (queries of that row at
  // or after it), counted over the call's tokens in their order.
  OptionalTensor positions = std::nullopt;
  OptionalTensor draft_mask = std::nullopt;  // (B, Sq, Sq) bool, without segment ids, Sq at most kMostDrafts
  OptionalTensor sinks = std::nullopt;       // (NH,)
  bool is_causal = true;
  double scale = 1.0;
  int64_t window_left = -1;   // -1: unbounded
  int64_t window_right = -1;  // -1: unbounded
  double softcap = 0.0;       // 0: none
  int64_t split_keys = 0;     // keys of a partial result, a multiple of kSplitUnit; 0: the kernel's choice
  bool needs_lse = false;     // the caller wants the logsumexp, too

  static constexpr int64_t kMostDrafts = 32;
  static constexpr int64_t kSplitUnit = 64;

  c10::SymInt batch() const { return query.sym_size(0); }
  c10::SymInt query_length() const { return query.sym_size(1); }
  c10::SymInt query_heads() const { return query.sym_size(2); }
  c10::SymInt head_dim() const { return query.sym_size(3); }
  c10::SymInt pages() const { return key.sym_size(0); }
  c10::SymInt page_size() const { return key.sym_size(1); }
  c10::SymInt key_heads() const { return key.sym_size(2); }
  c10::SymInt value_head_dim() const { return value.sym_size(3); }
  c10::SymInt rows() const { return lengths.sym_size(0); }
  c10::SymInt pages_per_row() const { return page_table ? page_table->sym_size(1) : c10::SymInt(1); }
  /// Slots of a row.
  c10::SymInt capacity() const { return pages_per_row() * page_size(); }

  bool requires_grad() const { return any_requires_grad({query, key, value, sinks}); }
};

/// What a caller may leave out, as the operators' schemas have it.
struct KvCacheArguments {
  OptionalTensor page_table;
  OptionalTensor segment_ids;
  bool is_causal = true;
  std::optional<double> qk_scale;
  OptionalTensor positions;
  int64_t window_left = -1;
  int64_t window_right = -1;
  double softcap = 0.0;
  OptionalTensor sinks;
  OptionalTensor draft_mask;
  OptionalTensor k_scale;
  OptionalTensor v_scale;
  int64_t split_keys = 0;
};

/// Validates a call and fills in the default scale. Reads no values: lengths, ids and entries of the table are checked
/// by who reads them (kv_cache/gather.h, or a kernel). Throws c10::TypeError for a wrong dtype, device or layout,
/// c10::ValueError for a wrong rank, shape or number, c10::NotImplementedError for scales of a quantised cache; each
/// message names the argument, what was expected and what came.
KvCacheProblem make_kv_cache_problem(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                                     const at::Tensor& lengths, const KvCacheArguments& arguments,
                                     bool needs_lse = false);

// ---------------------------------------------------------------- what attention and the writing operators check alike

/// k_cache (P, page_size, NKV, DQK), v_cache (P, page_size, NKV, DV): alike in everything but the head dimension.
void check_caches(const at::Tensor& k_cache, const at::Tensor& v_cache);

/// The table's kind, and the R rows of the cache that a call without ids has one row of tokens for. `rows`: R where
/// something else than the table says it.
void check_page_table(const OptionalTensor& page_table, const at::Tensor& k_cache,
                      const std::optional<c10::SymInt>& rows);

void check_no_scales(const OptionalTensor& k_scale, const OptionalTensor& v_scale);

}  // namespace selfattn
