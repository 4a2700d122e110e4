// append_kv_cache and qk_norm_rope_append in ATen operators, for every device without kernels of its own.
#include "kv_cache/append.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include "segment/segment_ids.h"

namespace selfattn {

AppendCall make_append_call(const at::Tensor& k, const at::Tensor& v, const at::Tensor& positions,
                            const OptionalTensor& page_table, const OptionalTensor& segment_ids,
                            const at::Tensor& k_cache, const at::Tensor& v_cache, const OptionalTensor& k_scale,
                            const OptionalTensor& v_scale) {
  check_no_scales(k_scale, v_scale);
  check_caches(k_cache, v_cache);
  for (const auto& [tensor, name, cache] : {std::tuple(&k, "k", &k_cache), std::tuple(&v, "v", &v_cache)}) {
    check_floating_point(*tensor, name, k_cache.device(), "k_cache");
    check_dtype(*tensor, name, k_cache.scalar_type(), "k_cache");
    TORCH_CHECK_VALUE(
        tensor->dim() == 4 && tensor->sym_size(2) == cache->sym_size(2) && tensor->sym_size(3) == cache->sym_size(3),
        "selfattn: ", name, " must have the shape (B, S, NKV, D) with the heads and head dimension of ", name,
        "_cache, ", cache->sym_sizes().slice(2, 2), "; got shape ", tensor->sym_sizes());
  }
  TORCH_CHECK_VALUE(v.sym_size(0) == k.sym_size(0) && v.sym_size(1) == k.sym_size(1),
                    "selfattn: v must have the batch size and length of k, ", k.sym_sizes().slice(0, 2), "; got ",
                    v.sym_sizes().slice(0, 2));
  check_token_integers(positions, "positions", k, "k");
  if (segment_ids) check_token_integers(*segment_ids, "segment_ids", k, "k");
  check_page_table(page_table, k_cache, segment_ids ? std::nullopt : std::optional(k.sym_size(0)));
  TORCH_CHECK_VALUE(!segment_ids || page_table || k_cache.sym_size(0) > 0,
                    "selfattn: k_cache must have at least one page beside segment_ids; got none");
  TORCH_CHECK_VALUE(!segment_ids || !page_table || page_table->sym_size(0) > 0,
                    "selfattn: page_table must have at least one row beside segment_ids; got none");
  return {k, v, positions, page_table, segment_ids, k_cache, v_cache};
}

namespace {

/// Where each token of a call goes.
struct Slots {
  at::Tensor page, offset;    // (B * S,) int64
  OptionalTensor is_written;  // (B * S,) bool; none: all are
};

/// The row of each token (B * S,) int64, those of the tokens that are not written being 0.
at::Tensor rows_of_tokens(const AppendCall& call) {
  const c10::SymInt batch = call.key.sym_size(0), length = call.key.sym_size(1);
  if (!call.segment_ids) {
    const at::Tensor rows = at::arange(batch, call.positions.options().dtype(at::kLong));
    return rows.unsqueeze(1).expand_symint({batch, length}).reshape({-1});
  }
  const c10::SymInt rows = call.page_table ? call.page_table->sym_size(0) : call.key_cache.sym_size(0);
  check_values(*call.segment_ids < at::Scalar(rows),
               "selfattn: segment_ids must hold rows of the cache, or negative values; got a larger one");
  return call.segment_ids->reshape({-1}).to(at::kLong).clamp(0);
}

Slots find_slots(const AppendCall& call) {
  const c10::SymInt page_size = call.key_cache.sym_size(1);
  const c10::SymInt capacity = call.page_table ? call.page_table->sym_size(1) * page_size : page_size;
  Slots slots;
  if (call.segment_ids) slots.is_written = call.segment_ids->reshape({-1}) >= 0;
  const auto where_written = [&](const at::Tensor& tensor) {
    return slots.is_written ? at::where(*slots.is_written, tensor, 0) : tensor;
  };
  const at::Tensor rows = rows_of_tokens(call);
  const at::Tensor position = where_written(call.positions.reshape({-1}).to(at::kLong));
  at::Tensor fits = at::logical_and(position >= 0, position < at::Scalar(capacity));
  if (slots.is_written) fits = fits.logical_or(slots.is_written->logical_not());
  check_values(
      fits,
      "selfattn: positions must hold slots of a row of the cache, from 0 to below its capacity (page_size times "
      "the pages of a row); got another");
  slots.offset = position.remainder(at::Scalar(page_size));
  slots.page = rows;
  if (call.page_table && capacity != 0) {
    const at::Tensor column = position.floor_divide(at::Scalar(page_size));
    slots.page = where_written(at::index(*call.page_table, {rows, column}).to(at::kLong));
    check_values(at::logical_and(slots.page >= 0, slots.page < at::Scalar(call.key_cache.sym_size(0))),
                 "selfattn: page_table must hold pages of the cache where tokens are written; got another");
  }
  return slots;
}

}  // namespace

/// Every token that is not written stands in for the first that is: equal writes to one slot, so that nothing is
/// selected by its value, which the host would have to read. Where none is written, slot 0 gets what it has.
void compose_append(const AppendCall& call) {
  if (call.key.sym_size(0) == 0 || call.key.sym_size(1) == 0) return;
  Slots slots = find_slots(call);
  at::Tensor source, is_any;
  if (slots.is_written) {
    const at::Tensor tokens = at::arange(slots.page.sym_size(0), slots.page.options());
    source = at::where(*slots.is_written, tokens, slots.is_written->to(at::kInt).argmax());
    is_any = slots.is_written->any();
    slots.page = slots.page.index_select(0, source), slots.offset = slots.offset.index_select(0, source);
  }
  for (const auto& [tokens, cache] :
       {std::pair(&call.key, &call.key_cache), std::pair(&call.value, &call.value_cache)}) {
    at::Tensor written = tokens->flatten(0, 1);
    if (slots.is_written) {
      written = at::where(is_any, written.index_select(0, source), at::index(*cache, {slots.page, slots.offset}));
    }
    at::Tensor(*cache).index_put_({slots.page, slots.offset}, written);
  }
}

at::Tensor compose_norm_rope_append(const NormRopeAppendCall& call) {
  const auto [query, key] = qk_norm_rope(call.norm_rope);
  AppendCall append = call.append;
  append.key = key;
  compose_append(append);
  return query;
}

namespace {

void write_nothing(const AppendCall&) {}

at::Tensor empty_query(const NormRopeAppendCall& call) {
  return at::empty_symint(call.norm_rope.q.sym_sizes(), call.norm_rope.q.options());
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, CompositeExplicitAutograd, m) {
  using namespace selfattn;
  m.impl("append_kv_cache", TORCH_FN(append_from_schema<compose_append>));
  m.impl("qk_norm_rope_append", TORCH_FN(norm_rope_append_from_schema<compose_norm_rope_append>));
}
TORCH_LIBRARY_IMPL(selfattn, Meta, m) {
  using namespace selfattn;
  m.impl("append_kv_cache", TORCH_FN(append_from_schema<write_nothing>));
  m.impl("qk_norm_rope_append", TORCH_FN(norm_rope_append_from_schema<empty_query>));
}
