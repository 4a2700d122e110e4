#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

// Tokens as they travel: the features of several tensors side by side, one collective for all.

namespace selfattn {

/// (..., F_i) each -> (..., their sum), contiguous. One that is all, and contiguous, comes as it is.
at::Tensor pack_features(const std::vector<at::Tensor>& tensors);

/// Into a view of any strides, of the source's shape; any dtype.
void copy_features(const at::Tensor& result, const at::Tensor& source);

/// Rows whose tokens come from the ranks of a group and go back to them, and the order in which attention takes them.
class TokensOfRanks {
 public:
  /// `order`: (B, n * s) int64, which of a row's tokens, numbered rank after rank, comes first, second, ...; undefined:
  /// as they are numbered.
  TokensOfRanks(const at::Tensor& order, int64_t ranks);

  /// (n, B, s, F) -> (B, n * s, F), contiguous
  at::Tensor as_rows(const at::Tensor& by_rank) const;

  /// (B, n * s, H_i, D_i) each -> (n, B, s, F), contiguous, their heads side by side
  at::Tensor pack_by_rank(const std::vector<at::Tensor>& rows);

 private:
  at::Tensor order_;    // of the n * B * s tokens as they come; undefined: rank after rank in each row
  at::Tensor inverse_;  // of `order_`, from the first time that tokens go back
  int64_t ranks_;
};

}  // namespace selfattn
