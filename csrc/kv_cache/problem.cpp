#include "kv_cache/problem.h"

#include <c10/util/Exception.h>

#include "common/dense_tensor.h"

namespace selfattn {
namespace {

void check_query(const at::Tensor& q, const at::Tensor& k_cache) {
  check_floating_point(q, "q", k_cache.device(), "k_cache");
  check_dtype(q, "q", k_cache.scalar_type(), "k_cache");
  TORCH_CHECK_VALUE(q.dim() == 4, "selfattn: q must have four dimensions (B, Sq, NH, DQK); got shape ", q.sym_sizes());
  const auto qs = q.sym_sizes(), ks = k_cache.sym_sizes();
  TORCH_CHECK_VALUE(qs[3] == ks[3], "selfattn: q must have the head dimension of k_cache, ", ks[3], "; got ", qs[3]);
  TORCH_CHECK_VALUE(qs[3] > 0, "selfattn: q must have a head dimension of at least 1; got ", qs[3]);
  TORCH_CHECK_VALUE(qs[2] % ks[2] == 0, "selfattn: the heads of q must be a multiple of the heads of k_cache; got ",
                    qs[2], " and ", ks[2]);
}

void check_draft_mask(const at::Tensor& mask, const KvCacheProblem& problem) {
  check_dense(mask, "draft_mask");
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool, "selfattn: draft_mask must be bool; got ", mask.scalar_type());
  check_device(mask, "draft_mask", problem.query.device(), "q");
  TORCH_CHECK_VALUE(!problem.segment_ids, "selfattn: draft_mask must not be given beside segment_ids");
  const c10::SymInt batch = problem.batch(), length = problem.query_length();
  TORCH_CHECK_VALUE(length <= KvCacheProblem::kMostDrafts, "selfattn: draft_mask serves at most ",
                    KvCacheProblem::kMostDrafts, " queries a row; got ", length);
  TORCH_CHECK_VALUE(
      mask.dim() == 3 && mask.sym_size(0) == batch && mask.sym_size(1) == length && mask.sym_size(2) == length,
      "selfattn: draft_mask must have the shape (B, Sq, Sq) = [", batch, ", ", length, ", ", length, "]; got ",
      mask.sym_sizes());
}

void check_split_keys(int64_t split_keys) {
  TORCH_CHECK_VALUE(split_keys >= 0 && split_keys % KvCacheProblem::kSplitUnit == 0,
                    "selfattn: split_keys must be 0 (the kernel's choice) or a positive multiple of ",
                    KvCacheProblem::kSplitUnit, "; got ", split_keys);
}

}  // namespace

void check_caches(const at::Tensor& k_cache, const at::Tensor& v_cache) {
  check_floating_point(k_cache, "k_cache");
  check_floating_point(v_cache, "v_cache", k_cache.device(), "k_cache");
  check_dtype(v_cache, "v_cache", k_cache.scalar_type(), "k_cache");
  TORCH_CHECK_VALUE(k_cache.dim() == 4,
                    "selfattn: k_cache must have four dimensions (P, page_size, NKV, DQK); got shape ",
                    k_cache.sym_sizes());
  TORCH_CHECK_VALUE(v_cache.dim() == 4,
                    "selfattn: v_cache must have four dimensions (P, page_size, NKV, DV); got shape ",
                    v_cache.sym_sizes());
  const auto ks = k_cache.sym_sizes(), vs = v_cache.sym_sizes();
  TORCH_CHECK_VALUE(vs[0] == ks[0] && vs[1] == ks[1] && vs[2] == ks[2],
                    "selfattn: v_cache must have the pages, page size and heads of k_cache, ", ks.slice(0, 3), "; got ",
                    vs.slice(0, 3));
  TORCH_CHECK_VALUE(ks[1] > 0 && ks[2] > 0,
                    "selfattn: k_cache must have at least one slot a page and one head; got shape ", ks);
}

void check_page_table(const OptionalTensor& page_table, const at::Tensor& k_cache,
                      const std::optional<c10::SymInt>& rows) {
  if (!page_table) {
    TORCH_CHECK_VALUE(!rows || k_cache.sym_size(0) == *rows,
                      "selfattn: k_cache must have one page a row without page_table, ", *rows, "; got ",
                      k_cache.sym_size(0));
    return;
  }
  check_integers(*page_table, "page_table");
  check_device(*page_table, "page_table", k_cache.device(), "k_cache");
  TORCH_CHECK_VALUE(page_table->dim() == 2 && (!rows || page_table->sym_size(0) == *rows),
                    "selfattn: page_table must have the shape (R, pages of a row)", rows ? " with R " : "",
                    rows ? c10::str(*rows) : "", "; got ", page_table->sym_sizes());
  TORCH_CHECK_VALUE(k_cache.sym_size(0) > 0,
                    "selfattn: k_cache must have at least one page beside page_table; got none");
}

void check_no_scales(const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  TORCH_CHECK_NOT_IMPLEMENTED(!k_scale, "selfattn: k_scale must not be given: quantised caches are not supported yet");
  TORCH_CHECK_NOT_IMPLEMENTED(!v_scale, "selfattn: v_scale must not be given: quantised caches are not supported yet");
}

KvCacheProblem make_kv_cache_problem(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                                     const at::Tensor& lengths, const KvCacheArguments& arguments, bool needs_lse) {
  check_no_scales(arguments.k_scale, arguments.v_scale);
  check_caches(k_cache, v_cache);
  check_query(q, k_cache);
  check_attention_numbers({.qk_scale = arguments.qk_scale,
                           .window_left = arguments.window_left,
                           .window_right = arguments.window_right,
                           .softcap = arguments.softcap});
  check_split_keys(arguments.split_keys);
  check_integers(lengths, "lengths");
  check_device(lengths, "lengths", k_cache.device(), "k_cache");
  TORCH_CHECK_VALUE(lengths.dim() == 1 && (arguments.segment_ids || lengths.sym_size(0) == q.sym_size(0)),
                    "selfattn: lengths must have the shape (R,), with the batch size of q, ", q.sym_size(0),
                    ", unless there are segment_ids; got ", lengths.sym_sizes());
  TORCH_CHECK_VALUE(!arguments.segment_ids || lengths.sym_size(0) > 0,
                    "selfattn: lengths must not be empty beside segment_ids; got none");
  check_page_table(arguments.page_table, k_cache, lengths.sym_size(0));
  if (arguments.segment_ids) check_token_integers(*arguments.segment_ids, "segment_ids", q, "q");
  if (arguments.positions) check_token_integers(*arguments.positions, "positions", q, "q");
  if (arguments.sinks) check_sinks(*arguments.sinks, q.sym_size(2), q.device(), "q");
  KvCacheProblem problem{.query = q,
                         .key = k_cache,
                         .value = v_cache,
                         .lengths = lengths,
                         .page_table = arguments.page_table,
                         .segment_ids = arguments.segment_ids,
                         .positions = arguments.positions,
                         .draft_mask = arguments.draft_mask,
                         .sinks = arguments.sinks,
                         .is_causal = arguments.is_causal,
                         .scale = scale_of(q, arguments.qk_scale, arguments.softcap),
                         .window_left = window_of(arguments.window_left),
                         .window_right = window_of(arguments.window_right),
                         .softcap = arguments.softcap,
                         .split_keys = arguments.split_keys,
                         .needs_lse = needs_lse};
  if (problem.draft_mask) check_draft_mask(*problem.draft_mask, problem);
  return problem;
}

}  // namespace selfattn
