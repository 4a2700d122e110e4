#pragma once

// What the forward and the backward pass share: a tile's rows, its products, and the masking and scaling of scores.
#include <algorithm>

#include "cpu/kernels/pack.h"

namespace selfattn::cpu {
inline namespace CPU_CAPABILITY {

/// Hands out pieces of a thread's workspace. With a null base it only counts them.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  template <typename E>
  E* take(int64_t count) {
    char* piece = base_ ? base_ + bytes_ : nullptr;
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(E)), 64);
    return reinterpret_cast<E*>(piece);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

/// The sizes of a problem's operands.
template <typename E>
struct Layout {
  static constexpr int64_t kPair = Operand<E>::kPair;

  explicit Layout(const FlashProblem& problem)
      : depth(round_up(problem.head_dim, kPair)),
        value_depth(round_up(problem.value_dim, kPair)),
        columns(round_up(problem.head_dim, kColumns)),
        value_columns(round_up(problem.value_dim, kColumns)),
        tokens(problem.key_tokens()) {}

  int64_t depth, value_depth;      // dimensions as the inner extent of a product
  int64_t columns, value_columns;  // dimensions as columns
  int64_t tokens;                  // of packed keys

  static int64_t transposed_elements(const FlashProblem& problem, int64_t dim) {
    return problem.key_tokens() * round_up(dim, kPair);
  }
  static int64_t rows_elements(const FlashProblem& problem, int64_t dim) {
    return problem.key_tokens() * round_up(dim, kColumns);
  }
};

/// Calls the products, the kernels' own or the problem's.
template <typename E>
struct Products {
  const FlashProblem& problem;

  void panel(int64_t m, int64_t n, int64_t k, const E* a, int64_t lda, const E* b, int64_t ldb, float* c, int64_t ldc,
             bool accumulate) const {
    if (problem.gemm) {
      problem.gemm(round_up(m, problem.row_step), n, k, a, lda, b, ldb, c, ldc, accumulate);
    } else {
      panel_gemm(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
    }
  }

  /// C (m x (end - first)) = A (m x depth) * the keys [first, end) of a transposed operand.
  void with_transposed(int64_t m, int64_t depth, const E* a, int64_t lda, const E* transposed, int64_t first,
                       int64_t end, float* c, int64_t ldc) const {
    for (int64_t key = first; key < end;) {
      const int64_t block = key / kPanel, next = std::min((block + 1) * kPanel, end);
      const E* b = transposed + block * kPanel * depth + (key - block * kPanel) * Operand<E>::kPair;
      panel(m, next - key, depth, a, lda, b, kPanel, c + (key - first), ldc, false);
      key = next;
    }
  }

  /// C (m x columns) = or += A (m x (end - first)) * the keys [first, end) of a rows operand.
  void with_rows(int64_t m, int64_t columns, const E* a, int64_t lda, const E* rows, int64_t tokens, int64_t first,
                 int64_t end, float* c, int64_t ldc, bool accumulate) const {
    for (int64_t column = 0; column < columns; column += kPanel) {
      const int64_t width = std::min(kPanel, columns - column);
      panel(m, width, end - first, a, lda, rows + column * tokens + first * width, width, c + column, ldc, accumulate);
    }
  }
};

/// The rows of a tile: which keys each may attend to.
struct TileRows {
  int32_t first_key[kTileRows], end_key[kTileRows], id[kTileRows];
  bool compares_ids;

  TileRows(const FlashProblem& problem, const QueryTile& tile) : compares_ids(problem.plan->compares_ids[tile.batch]) {
    const int64_t group = problem.group();
    for (int64_t row = 0; row < tile.rows; ++row) {
      const int64_t token = tile.batch * problem.query_length + (tile.first_row + row) / group;
      first_key[row] = problem.plan->first_key[token];
      end_key[row] = problem.plan->end_key[token];
      id[row] = compares_ids ? problem.query_ids[token] : 0;
    }
  }
};

/// Logits in units of log2: how scores (products of queries and keys) become them.
struct LogitRule {
  explicit LogitRule(const FlashProblem& problem)
      : is_capped(problem.softcap > 0.0f),
        // Scores that are only scaled, by a positive number, are scaled on the fly, after the mask.
        is_prepared(is_capped || !(problem.scale > 0.0f)),
        factor(is_prepared ? 1.0f : problem.scale * kLog2e),
        inner(is_capped ? problem.scale / problem.softcap : problem.scale * kLog2e),
        outer(problem.softcap * kLog2e) {}

  bool is_capped, is_prepared;
  float factor;        // of prepared scores
  float inner, outer;  // logit = outer * tanh(inner * score), or inner * score

  void prepare(float* score, int64_t first, int64_t end) const {
    for (int64_t i = first; i < end; i += kLanes) {
      const Vec scaled = load(score + i) * Vec(inner);
      (is_capped ? scaled.tanh() * Vec(outer) : scaled).store(score + i);
    }
  }
};

/// Columns of a tile, in whole vectors.
struct Span {
  int64_t first, end;
};

/// Turns a row's scores of the keys [first_key, first_key + count) into what LogitRule::factor makes logits: -inf where
/// the pair is not allowed. Only the span that it returns is defined; outside it no pair is allowed.
inline Span mask_row(const TileRows& rows, int64_t row, const int32_t* key_ids, int64_t first_key, int64_t count,
                     bool is_full, const LogitRule& rule, float* score) {
  if (is_full) {
    if (rule.is_prepared) rule.prepare(score, 0, count);
    return {0, count};
  }
  const int64_t first = std::clamp<int64_t>(rows.first_key[row] - first_key, 0, count);
  const int64_t end = std::clamp<int64_t>(rows.end_key[row] - first_key, 0, count);
  if (first >= end) return {0, 0};
  const Span span{first / kLanes * kLanes, round_up(end, kLanes)};
  if (rule.is_prepared) rule.prepare(score, span.first, span.end);
  std::fill(score + span.first, score + first, -kInfinity);
  std::fill(score + end, score + span.end, -kInfinity);
  if (rows.compares_ids) {
    const int32_t id = rows.id[row];
    const int32_t* ids = key_ids + first_key;
    for (int64_t i = first; i < end; ++i) score[i] = ids[i] == id ? score[i] : -kInfinity;
  }
  return span;
}

}  // namespace CPU_CAPABILITY
}  // namespace selfattn::cpu
