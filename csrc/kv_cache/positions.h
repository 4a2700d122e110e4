#pragma once

#include <c10/core/SymInt.h>

#include "common/dispatch.h"
#include "common/optional_tensor.h"

// The operators that read a cache's integers. The first two check their values: a ValueError on the CPU, an assertion
// on the device elsewhere, and never a synchronisation. They are operators so that a traced graph keeps the checks.

namespace selfattn {

/// lengths (R,), segment_ids (B, Sq) or none with B == R: the slot of each of the call's tokens (B, Sq) int64. It is
/// the token's own of `positions` (B, Sq), where they are given, else lengths[row] - (tokens of that row at or after
/// it); -1 for a token of no row. Requires lengths from 0 to `capacity`, ids below R, and positions that fit in int32.
/// int32 or int64 all.
at::Tensor kv_cache_positions(const at::Tensor& lengths, const OptionalTensor& segment_ids,
                              const c10::SymInt& num_queries, const c10::SymInt& capacity,
                              const OptionalTensor& positions);

/// The table as an index: page_table (R, N) with 0 in the place of an entry that `is_used` (R, N) bool leaves out,
/// int64. Requires those that are used to be from 0 to `pages` - 1.
at::Tensor kv_cache_pages(const at::Tensor& page_table, const at::Tensor& is_used, const c10::SymInt& pages);

/// lengths (R,) after a call that appends the tokens of segment_ids (B, S), or without ids num_tokens to each row; of
/// the same dtype.
at::Tensor lengths_after_append(const at::Tensor& lengths, const OptionalTensor& segment_ids,
                                const c10::SymInt& num_tokens);

}  // namespace selfattn
