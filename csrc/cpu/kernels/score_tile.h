#pragma once

// What the forward and the backward pass share: a tile's rows, its products, and the masking and scaling of scores.
#include <algorithm>

#include "cpu/kernels/pack.h"
#include "cpu/kernels/softmax.h"
#include "cpu/kernels/workspace.h"

namespace selfattn::cpu {
inline namespace CPU_CAPABILITY {

/// The sizes of a problem's operands.
template <typename E>
struct Layout {
  static constexpr int64_t kVnniWidth = Operand<E>::kVnniWidth;

  explicit Layout(const FlashProblem& problem)
      : depth(round_up(problem.head_dim, kVnniWidth)),
        value_depth(round_up(problem.value_dim, kVnniWidth)),
        columns(round_up(problem.head_dim, kColumns)),
        value_columns(round_up(problem.value_dim, kColumns)),
        tokens(problem.key_tokens()) {}

  int64_t depth, value_depth;      // dimensions as the inner extent of a product
  int64_t columns, value_columns;  // dimensions as columns
  int64_t tokens;                  // of packed keys

  static int64_t transposed_elements(const FlashProblem& problem, int64_t dim) {
    return problem.key_tokens() * round_up(dim, kVnniWidth);
  }
  static int64_t rows_elements(const FlashProblem& problem, int64_t dim) {
    return problem.key_tokens() * round_up(dim, kColumns);
  }
};

/// Products of packed operands.
template <typename E>
struct Products {
  static constexpr int64_t kLongestChain =
      64 * Operand<E>::kVnniWidth;  // dimensions of a score summed up one after another

  const FlashProblem& problem;

  void panel(int64_t m, int64_t n, int64_t k, const E* a, int64_t lda, const E* b, int64_t ldb, float* c, int64_t ldc,
             bool accumulate) const {
    // A matrix unit wants whole tiles of its own, and few shapes, since it keeps a kernel for each.
    if (problem.matrix_unit && m % 16 == 0 && m >= 32 && n == kPanel && k % 16 == 0 && k >= 32) {
      problem.matrix_unit(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
    } else {
      panel_gemm(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
    }
  }

  /// C (m x keys) = A (m x depth) * the keys of a transposed operand.
  void with_transposed(int64_t m, int64_t depth, const E* a, const E* transposed, Span keys, float* c,
                       int64_t ldc) const {
    for (int64_t key = keys.first; key < keys.end;) {
      const int64_t block = key / kPanel, next = std::min((block + 1) * kPanel, keys.end);
      const E* b = transposed + block * kPanel * depth + (key - block * kPanel) * Operand<E>::kVnniWidth;
      // In pieces: a long chain of additions has larger rounding errors than ATen's products have.
      const int64_t pieces = problem.matrix_unit ? 1 : (depth + kLongestChain - 1) / kLongestChain;
      const int64_t length = round_up((depth + pieces - 1) / pieces, Operand<E>::kVnniWidth);
      for (int64_t d = 0; d < depth; d += length) {
        panel(m, next - key, std::min(length, depth - d), a + d, depth, b + d * kPanel, kPanel, c + (key - keys.first),
              ldc, d > 0);
      }
      key = next;
    }
  }

  /// C (m x columns) = or += A (m x keys) * the keys of a rows operand.
  void with_rows(int64_t m, int64_t columns, const E* a, int64_t lda, const E* rows, int64_t tokens, Span keys,
                 float* c, bool accumulate) const {
    for (int64_t column = 0; column < columns; column += kPanel) {
      const int64_t width = std::min(kPanel, columns - column);
      const E* b = rows + column * tokens + keys.first * width;
      panel(m, width, keys.count(), a, lda, b, width, c + column, columns, accumulate);
    }
  }
};

/// The tile of an index into (heads, tiles).
inline const QueryTile& tile_of(const FlashProblem& problem, int64_t index) {
  const int64_t tiles = problem.tiles();
  return problem.pair_table->query_tiles[index / tiles / problem.key_heads * tiles + index % tiles];
}

/// The rows of a tile: which keys each may attend to.
struct TileRows {
  int32_t first_key[kTileRows], end_key[kTileRows], id[kTileRows];
  int32_t first_position[kTileRows], last_position[kTileRows];  // where positions are compared
  int64_t count;
  bool compares_ids, compares_positions;
  const int32_t *key_ids, *key_positions;  // (Skv), where they are compared

  TileRows(const FlashProblem& problem, const QueryTile& tile)
      : count(tile.rows),
        compares_ids(problem.pair_table->compares_ids[tile.batch]),
        compares_positions(problem.pair_table->compares_positions[tile.batch]),
        key_ids(compares_ids ? problem.key_ids + tile.batch * problem.key_length : nullptr),
        key_positions(compares_positions ? problem.key_positions + tile.batch * problem.key_length : nullptr) {
    const int64_t group = problem.group;
    for (int64_t row = 0; row < tile.rows; ++row) {
      const int64_t token = tile.batch * problem.query_length + (tile.first_row + row) / group;
      first_key[row] = problem.pair_table->first_key[token];
      end_key[row] = problem.pair_table->end_key[token];
      id[row] = compares_ids ? problem.query_ids[token] : 0;
      if (!compares_positions) continue;
      first_position[row] = problem.pair_table->first_position[token];
      last_position[row] = problem.pair_table->last_position[token];
    }
  }

  bool allows(int64_t row, int64_t key) const {
    return first_key[row] <= key && key < end_key[row] && (!compares_ids || key_ids[key] == id[row]) &&
           (!compares_positions ||
            (first_position[row] <= key_positions[key] && key_positions[key] <= last_position[row]));
  }

  /// Replaces the values of the columns of `keys` that the row may not attend to by their id or position.
  void replace_forbidden(int64_t row, Span keys, Span columns, float* __restrict values, float replacement) const {
    if (compares_ids) {
      const int32_t* __restrict ids = key_ids + keys.first;
      const int32_t own = id[row];
      for (int64_t i = columns.first; i < columns.end; ++i) values[i] = ids[i] == own ? values[i] : replacement;
    }
    if (compares_positions) {
      const int32_t* __restrict positions = key_positions + keys.first;
      const int32_t first = first_position[row], last = last_position[row];
      for (int64_t i = columns.first; i < columns.end; ++i) {
        const bool is_allowed = (first <= positions[i]) & (positions[i] <= last);
        values[i] = is_allowed ? values[i] : replacement;
      }
    }
  }

  /// Calls apply(rows, keys) with groups of rows, and the keys that some row of the group may attend to.
  template <typename Do>
  void for_each_group(Span keys, bool is_full, const Do& apply) const {
    const int64_t group = is_full ? count : kRowGroup;
    for (int64_t row = 0; row < count; row += group) {
      const Span rows{row, std::min(row + group, count)};
      apply(rows, is_full ? keys : keys_of(rows, keys));
    }
  }

  /// The columns of `keys` that the row may attend to, its id and position permitting.
  Span columns_of(int64_t row, Span keys) const {
    return {std::clamp<int64_t>(first_key[row] - keys.first, 0, keys.count()),
            std::clamp<int64_t>(end_key[row] - keys.first, 0, keys.count())};
  }

  /// The keys among `keys` that some of the rows may attend to, in whole steps from the first of `keys` on.
  Span keys_of(Span rows, Span keys) const {
    Span found{keys.end, keys.first};
    for (int64_t row = rows.first; row < rows.end; ++row) {
      if (first_key[row] >= end_key[row]) continue;
      found.first = std::min<int64_t>(found.first, first_key[row]);
      found.end = std::max<int64_t>(found.end, end_key[row]);
    }
    found.first = std::max(found.first, keys.first), found.end = std::min(found.end, keys.end);
    if (found.is_empty()) return {};
    return {keys.first + (found.first - keys.first) / kColumns * kColumns,
            std::min(keys.first + round_up(found.end - keys.first, kColumns), keys.end)};
  }

  /// From the first to the last row that may attend to some of the keys.
  Span rows_of(Span keys, int64_t rows) const {
    Span found{rows, 0};
    for (int64_t row = 0; row < rows; ++row) {
      if (first_key[row] >= keys.end || end_key[row] <= keys.first) continue;
      found.first = std::min(found.first, row);
      found.end = row + 1;
    }
    return found;
  }
};

/// Columns as whole vectors.
inline Span whole_vectors(Span columns) { return {columns.first / kLanes * kLanes, round_up(columns.end, kLanes)}; }

/// Prepares a row's scores of the keys and makes those -inf where the pair is not allowed. Only the columns that it
/// returns, whole vectors, are defined; elsewhere no pair is allowed.
inline Span mask_row(const TileRows& rows, int64_t row, Span keys, bool is_full, const LogitRule& rule, float* score) {
  const Span columns = is_full ? Span{0, keys.count()} : rows.columns_of(row, keys);
  if (columns.is_empty()) return {};
  const Span vectors = whole_vectors(columns);
  if (rule.is_prepared) rule.prepare(score, vectors);
  if (is_full) return vectors;
  std::fill(score + vectors.first, score + columns.first, -kInfinity);
  std::fill(score + columns.end, score + vectors.end, -kInfinity);
  rows.replace_forbidden(row, keys, columns, score, -kInfinity);
  return vectors;
}

}  // namespace CPU_CAPABILITY
}  // namespace selfattn::cpu
