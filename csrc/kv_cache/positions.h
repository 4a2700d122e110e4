#pragma once

#include <c10/core/SymInt.h>

#include <tuple>

#include "common/dispatch.h"
#include "common/optional_tensor.h"

// The operators that read a cache's integers. All but lengths_after_append check their values: a ValueError on the CPU,
// an assertion on the device elsewhere, and never a synchronisation. They are operators so that a traced graph keeps
// the checks.

namespace selfattn {

/// A call of kv_cache_positions or positions_of_append: tokens, and the rows of the cache that they belong to;
/// validated in everything but the values of its integers, int32 or int64 all.
struct PositionsCall {
  at::Tensor lengths;          // (R,): slots in use
  OptionalTensor segment_ids;  // (B, S) the row of each token, a negative one belongs to none; none: B == R
  c10::SymInt num_tokens;      // S
  c10::SymInt capacity;        // slots of a row
  OptionalTensor positions;    // (B, S) the slot of each token, where it is not one of the row's last

  c10::SymInt batch() const { return segment_ids ? segment_ids->sym_size(0) : lengths.sym_size(0); }
};

/// Throws c10::TypeError and c10::ValueError as make_kv_cache_problem does; `num_tokens_name`: the argument's.
PositionsCall make_positions_call(const at::Tensor& lengths, const OptionalTensor& segment_ids,
                                  const c10::SymInt& num_tokens, const char* num_tokens_name,
                                  const c10::SymInt& capacity, const OptionalTensor& positions);

template <at::Tensor (*kImplementation)(const PositionsCall&)>
at::Tensor positions_from_schema(const at::Tensor& lengths, const OptionalTensor& segment_ids, c10::SymInt num_queries,
                                 c10::SymInt capacity, const OptionalTensor& positions) {
  return kImplementation(make_positions_call(lengths, segment_ids, num_queries, "num_queries", capacity, positions));
}

/// lengths (R,) and positions (B, S).
using LengthsAndPositions = std::tuple<at::Tensor, at::Tensor>;

template <LengthsAndPositions (*kImplementation)(const PositionsCall&)>
LengthsAndPositions append_positions_from_schema(const at::Tensor& lengths, const OptionalTensor& segment_ids,
                                                 c10::SymInt num_tokens, c10::SymInt capacity,
                                                 const OptionalTensor& positions) {
  return kImplementation(make_positions_call(lengths, segment_ids, num_tokens, "num_tokens", capacity, positions));
}

/// The operators in ATen operators, for what kernels do not serve. Memory of the order of tokens times rows.
at::Tensor compose_positions(const PositionsCall& call);
LengthsAndPositions compose_positions_of_append(const PositionsCall& call);

/// The slot of each of the call's tokens (B, Sq) int64, through the dispatcher: the token's own of `positions`, where
/// they are given, else lengths[row] - (tokens of that row at or after it); -1 for a token of no row. Requires lengths
/// from 0 to `capacity`, ids below R, and positions that fit in int32.
at::Tensor kv_cache_positions(const at::Tensor& lengths, const OptionalTensor& segment_ids,
                              const c10::SymInt& num_queries, const c10::SymInt& capacity,
                              const OptionalTensor& positions);

/// lengths (R,) after a call that appends the tokens of segment_ids (B, S), or without ids num_tokens to each row; of
/// the same dtype.
at::Tensor lengths_after_append(const at::Tensor& lengths, const OptionalTensor& segment_ids,
                                const c10::SymInt& num_tokens);

/// Both in one: the lengths after the call, and its kv_cache_positions by them.
LengthsAndPositions positions_of_append(const at::Tensor& lengths, const OptionalTensor& segment_ids,
                                        const c10::SymInt& num_tokens, const c10::SymInt& capacity,
                                        const OptionalTensor& positions);

/// The table as an index: page_table (R, N) with 0 in the place of an entry that `is_used` (R, N) bool leaves out,
/// int64. Requires those that are used to be from 0 to `pages` - 1.
at::Tensor kv_cache_pages(const at::Tensor& page_table, const at::Tensor& is_used, const c10::SymInt& pages);

}  // namespace selfattn
