#include "kv_cache/positions.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include "common/dense_tensor.h"
#include "segment/segment_ids.h"

namespace selfattn {

at::Tensor kv_cache_positions(const at::Tensor& lengths, const OptionalTensor& segment_ids,
                              const c10::SymInt& num_queries, const c10::SymInt& capacity,
                              const OptionalTensor& positions) {
  static const auto op = find_op<decltype(positions_from_schema<nullptr>)>("selfattn::kv_cache_positions");
  return op.call(lengths, segment_ids, num_queries, capacity, positions);
}

LengthsAndPositions positions_of_append(const at::Tensor& lengths, const OptionalTensor& segment_ids,
                                        const c10::SymInt& num_tokens, const c10::SymInt& capacity,
                                        const OptionalTensor& positions) {
  static const auto op = find_op<decltype(append_positions_from_schema<nullptr>)>("selfattn::positions_of_append");
  return op.call(lengths, segment_ids, num_tokens, capacity, positions);
}

at::Tensor kv_cache_pages(const at::Tensor& page_table, const at::Tensor& is_used, const c10::SymInt& pages) {
  static const auto op =
      find_op<at::Tensor(const at::Tensor&, const at::Tensor&, c10::SymInt)>("selfattn::kv_cache_pages");
  return op.call(page_table, is_used, pages);
}

at::Tensor lengths_after_append(const at::Tensor& lengths, const OptionalTensor& segment_ids,
                                const c10::SymInt& num_tokens) {
  static const auto op =
      find_op<at::Tensor(const at::Tensor&, const OptionalTensor&, c10::SymInt)>("selfattn::lengths_after_append");
  return op.call(lengths, segment_ids, num_tokens);
}

namespace {

constexpr int64_t kMostTokens = int64_t{1} << 30;  // of a batch row

void check_lengths_call(const at::Tensor& lengths, const OptionalTensor& segment_ids, const c10::SymInt& num_tokens,
                        const char* num_tokens_name) {
  check_integers(lengths, "lengths");
  TORCH_CHECK_VALUE(lengths.dim() == 1, "selfattn: lengths must have the shape (R,); got ", lengths.sym_sizes());
  TORCH_CHECK_VALUE(num_tokens >= 0 && num_tokens <= kMostTokens, "selfattn: ", num_tokens_name, " must be from 0 to ",
                    kMostTokens, "; got ", num_tokens);
  if (!segment_ids) return;
  check_integer_rows(*segment_ids, "segment_ids");
  check_device(*segment_ids, "segment_ids", lengths.device(), "lengths");
  TORCH_CHECK_VALUE(segment_ids->sym_size(1) == num_tokens, "selfattn: segment_ids must have ", num_tokens_name,
                    " columns, ", num_tokens, "; got shape ", segment_ids->sym_sizes());
  TORCH_CHECK_VALUE(lengths.sym_size(0) > 0, "selfattn: lengths must not be empty beside segment_ids; got none");
}

void check_lengths(const at::Tensor& lengths, const c10::SymInt& capacity) {
  check_values(
      at::logical_and(lengths >= 0, lengths <= at::Scalar(capacity)),
      "selfattn: lengths must hold values from 0 to the slots of a row of the cache (page_size times the pages "
      "of a row); got another");
}

/// ids (T,) -> (T, R) bool.
at::Tensor tokens_of_rows(const at::Tensor& ids, const c10::SymInt& rows) {
  return ids.unsqueeze(1) == at::arange(rows, ids.options());
}

/// Tokens of the same row at or after each of the ids (T,).
at::Tensor tokens_from_here(const at::Tensor& ids, const c10::SymInt& rows) {
  const at::Tensor is_of_row = tokens_of_rows(ids, rows);
  const at::Tensor from_here = is_of_row.to(at::kLong).flip(0).cumsum(0).flip(0);
  return at::where(is_of_row, from_here, 0).sum(1);
}

void check_ids(const at::Tensor& segment_ids, const c10::SymInt& rows) {
  check_values(
      segment_ids < at::Scalar(rows),
      "selfattn: segment_ids must hold rows of the cache, below the number of lengths, or negative values; got "
      "a larger one");
}

/// Requires ids of the call's rows.
at::Tensor appended_lengths(const at::Tensor& lengths, const OptionalTensor& segment_ids,
                            const c10::SymInt& num_tokens) {
  if (!segment_ids) return lengths + at::Scalar(num_tokens);
  const at::Tensor counts = tokens_of_rows(segment_ids->reshape({-1}), lengths.sym_size(0)).sum(0);
  return lengths + counts.to(lengths.scalar_type());
}

}  // namespace

PositionsCall make_positions_call(const at::Tensor& lengths, const OptionalTensor& segment_ids,
                                  const c10::SymInt& num_tokens, const char* num_tokens_name,
                                  const c10::SymInt& capacity, const OptionalTensor& positions) {
  check_lengths_call(lengths, segment_ids, num_tokens, num_tokens_name);
  const PositionsCall call{lengths, segment_ids, num_tokens, capacity, positions};
  if (!positions) return call;
  check_integer_rows(*positions, "positions");
  check_device(*positions, "positions", lengths.device(), "lengths");
  TORCH_CHECK_VALUE(positions->sym_size(0) == call.batch() && positions->sym_size(1) == num_tokens,
                    "selfattn: positions must have the shape (B, ", num_tokens_name, ") = [", call.batch(), ", ",
                    num_tokens, "]; got ", positions->sym_sizes());
  return call;
}

at::Tensor compose_positions(const PositionsCall& call) {
  const auto& [lengths, segment_ids, num_tokens, capacity, positions] = call;
  const at::Tensor ends = lengths.to(at::kLong);
  check_lengths(ends, capacity);
  if (segment_ids) check_ids(*segment_ids, lengths.sym_size(0));
  if (positions) {
    const at::Tensor given = as_int32(*positions, "positions").to(at::kLong, /*non_blocking=*/false, /*copy=*/true);
    return segment_ids ? given.masked_fill(*segment_ids < 0, -1) : given;
  }
  if (!segment_ids) {
    // Of one query, as every step of generation has, one operator does in the place of three.
    if (num_tokens.maybe_as_int() == 1) return ends.unsqueeze(1) - 1;
    return ends.unsqueeze(1) - num_tokens + at::arange(num_tokens, ends.options());
  }
  const at::Tensor ids = segment_ids->reshape({-1}).to(at::kLong);
  const at::Tensor of_rows = ends.index_select(0, ids.clamp(0)) - tokens_from_here(ids, lengths.sym_size(0));
  return of_rows.masked_fill(ids < 0, -1).view_symint(segment_ids->sym_sizes());
}

LengthsAndPositions compose_positions_of_append(const PositionsCall& call) {
  PositionsCall after = call;
  after.lengths = appended_lengths(call.lengths, call.segment_ids, call.num_tokens);
  return {after.lengths, compose_positions(after)};
}

namespace {

at::Tensor empty_positions(const PositionsCall& call) {
  return at::empty_symint({call.batch(), call.num_tokens}, call.lengths.options().dtype(at::kLong));
}

LengthsAndPositions empty_positions_of_append(const PositionsCall& call) {
  return {at::empty_symint(call.lengths.sym_sizes(), call.lengths.options()), empty_positions(call)};
}

void check_pages_call(const at::Tensor& page_table, const at::Tensor& is_used) {
  check_integer_rows(page_table, "page_table");
  check_dense(is_used, "is_used");
  check_device(is_used, "is_used", page_table.device(), "page_table");
  TORCH_CHECK_TYPE(is_used.scalar_type() == at::kBool, "selfattn: is_used must be bool; got ", is_used.scalar_type());
  TORCH_CHECK_VALUE(is_used.sym_sizes() == page_table.sym_sizes(),
                    "selfattn: is_used must have the shape of page_table, ", page_table.sym_sizes(), "; got ",
                    is_used.sym_sizes());
}

at::Tensor used_pages(const at::Tensor& page_table, const at::Tensor& is_used, c10::SymInt pages) {
  check_pages_call(page_table, is_used);
  const at::Tensor index = at::where(is_used, page_table, 0).to(at::kLong);
  check_values(at::logical_and(index >= 0, index < at::Scalar(pages)),
               "selfattn: page_table must hold pages of the cache where they are used; got another");
  return index;
}

at::Tensor empty_pages(const at::Tensor& page_table, const at::Tensor& is_used, c10::SymInt) {
  check_pages_call(page_table, is_used);
  return at::empty_symint(page_table.sym_sizes(), page_table.options().dtype(at::kLong));
}

at::Tensor lengths_from_schema(const at::Tensor& lengths, const OptionalTensor& segment_ids, c10::SymInt num_tokens) {
  check_lengths_call(lengths, segment_ids, num_tokens, "num_tokens");
  return appended_lengths(lengths, segment_ids, num_tokens);
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, CompositeImplicitAutograd, m) {
  using namespace selfattn;
  m.impl("lengths_after_append", TORCH_FN(lengths_from_schema));
}
TORCH_LIBRARY_IMPL(selfattn, CompositeExplicitAutograd, m) {
  using namespace selfattn;
  m.impl("kv_cache_positions", TORCH_FN(positions_from_schema<compose_positions>));
  m.impl("positions_of_append", TORCH_FN(append_positions_from_schema<compose_positions_of_append>));
  m.impl("kv_cache_pages", TORCH_FN(used_pages));
}
TORCH_LIBRARY_IMPL(selfattn, Meta, m) {
  using namespace selfattn;
  m.impl("kv_cache_positions", TORCH_FN(positions_from_schema<empty_positions>));
  m.impl("positions_of_append", TORCH_FN(append_positions_from_schema<empty_positions_of_append>));
  m.impl("kv_cache_pages", TORCH_FN(empty_pages));
}
