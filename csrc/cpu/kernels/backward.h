#pragma once

// Backward: P = exp(logit - lse), dS = P * (dP - delta) with dP = dO V^T and delta = rowsum(dO * O) - dlse; then
// dV = P^T dO, dK = scale * dS^T Q, dQ = scale * dS K. Gradients of keys and values are summed up transposed, so that P
// and dS are the right operand, in the order in which they are computed.
#include <vector>

#include "cpu/kernels/score_tile.h"

namespace selfattn::cpu {
inline namespace CPU_CAPABILITY {

constexpr int64_t kBackwardSpan = 2 * kPanel;  // keys whose gradients are summed up at once

template <typename T, typename E>
class Backward {
  static constexpr bool kIsInPlace = std::is_same_v<E, float>;  // P and dS take the place of the scores and of dP
  static constexpr int64_t kVnniWidth = Operand<E>::kVnniWidth;

 public:
  Backward(const BackwardProblem& problem, void* workspace)
      : p_(problem), layout_(problem), products_{problem}, rule_(problem.scale, problem.softcap), space_(workspace) {
    const int64_t widest = std::max(layout_.columns, layout_.value_columns);
    staging_ = space_.take<float>(kBackwardSpan * widest);
    scores_ = space_.take<float>(kTileRows * kBackwardSpan);
    grad_weights_ = space_.take<float>(kTileRows * kBackwardSpan);
    slopes_ = rule_.is_capped ? space_.take<float>(kBackwardSpan) : nullptr;
    if constexpr (!kIsInPlace) {
      weights_operand_ = space_.take<E>(kTileRows * kBackwardSpan);
      grad_scores_operand_ = space_.take<E>(kTileRows * kBackwardSpan);
      grad_scores_rows_ = space_.take<E>(kTileRows * kBackwardSpan);
    }
    grad_key_ = space_.take<float>(layout_.depth * kBackwardSpan);
    grad_value_ = space_.take<float>(layout_.value_depth * kBackwardSpan);
    grad_query_ = space_.take<float>(kTileRows * layout_.columns);
  }

  int64_t workspace_bytes() const { return space_.bytes(); }

  static int64_t key_spans(const FlashProblem& problem) {
    return round_up(problem.key_length, kBackwardSpan) / kBackwardSpan;
  }

  static int64_t query_tile_bytes(const FlashProblem& problem) {
    Workspace space(nullptr);
    TileOperands(space, Layout<E>(problem));
    return space.bytes();
  }

  void pack_keys(int64_t task) {
    const int64_t head = task / p_.blocks(), first = task % p_.blocks() * kPanel;
    const int64_t batch = head / p_.key_heads, key_head = head % p_.key_heads;
    const int64_t count = std::min(kPanel, p_.key_length - first);
    E* staging = reinterpret_cast<E*>(staging_);
    const auto key = as_operand(p_.key.at<const T>(batch, first, key_head), p_.key.token_stride, count, p_.head_dim,
                                layout_.depth, staging);
    pack_transposed(key, count, layout_.depth, key_transposed(head) + first * layout_.depth);
    const uint64_t nonfinite =
        find_nonfinite_rows(p_.key.at<const T>(batch, first, key_head), p_.key.token_stride, count, p_.head_dim);
    nonfinite_keys(head)[first / kPanel] = nonfinite;
    pack_rows(nonfinite ? without_rows(nonfinite, key, count, p_.head_dim, staging) : key, count, p_.head_dim, first,
              layout_.tokens, key_rows(head));
    const auto value = as_operand(p_.value.at<const T>(batch, first, key_head), p_.value.token_stride, count,
                                  p_.value_dim, layout_.value_depth, staging);
    pack_transposed(value, count, layout_.value_depth, value_transposed(head) + first * layout_.value_depth);
  }

  void pack_queries(int64_t task) {
    const QueryTile& tile = tile_of(p_, task);
    const int64_t key_head = task / p_.tiles() % p_.key_heads, group = p_.group;
    const TileOperands operands = operands_of(task);
    uint64_t nonfinite_grads = 0;
    for (int64_t row = 0; row < kTileRows; ++row) {
      E* query = operands.query + row * layout_.depth;
      E* grad = operands.grad_out + row * layout_.value_depth;
      if (row >= tile.rows) {
        std::fill_n(query, layout_.depth, E(0.0f));
        std::fill_n(grad, layout_.value_depth, E(0.0f));
        continue;
      }
      const int64_t token = (tile.first_row + row) / group;
      const int64_t query_head = key_head * group + (tile.first_row + row) % group;
      copy_row(p_.query.at<const T>(tile.batch, token, query_head), p_.head_dim, layout_.depth, query);
      const T* grad_row = p_.grad_out.at<const T>(tile.batch, token, query_head);
      copy_row(grad_row, p_.value_dim, layout_.value_depth, grad);
      const int64_t index = (tile.batch * p_.query_heads + query_head) * p_.query_length + token;
      const float product = dot(p_.out.at<const T>(tile.batch, token, query_head), grad_row, p_.value_dim);
      operands.delta[row] = product - (p_.grad_lse ? p_.grad_lse[index] : 0.0f);
      // Only where the product is not finite can the gradient be so.
      if (!std::isfinite(product)) nonfinite_grads |= find_nonfinite_rows(grad_row, 0, 1, p_.value_dim) << row;
      // A row that attends to nothing: every weight is exp2(-inf) = 0.
      operands.lse[row] = p_.lse[index] == -kInfinity ? kInfinity : p_.lse[index];
    }
    transpose_tile(operands.query, layout_.depth, operands.query_transposed);
    transpose_tile(operands.grad_out, layout_.value_depth, operands.grad_out_transposed);
    const uint64_t nonfinite_queries = find_nonfinite_rows(operands.query, layout_.depth, tile.rows, p_.head_dim);
    clear_columns(nonfinite_queries, layout_.depth, operands.query_transposed);
    clear_columns(nonfinite_grads, layout_.value_depth, operands.grad_out_transposed);
    *operands.nonfinite_queries = nonfinite_queries;
    *operands.nonfinite_grads = nonfinite_grads;
  }

  /// Bytes of the workspace of head_gradients.
  static int64_t head_workspace_bytes(const BackwardProblem& problem) {
    Workspace space(nullptr);
    problem_of_head(problem, 0, space);
    return space.bytes() + Backward(problem, nullptr).workspace_bytes();
  }

  /// All gradients of a head: what its tiles and spans of keys contribute to both sides is computed once.
  static void head_gradients(const BackwardProblem& problem, int64_t head, void* workspace) {
    Workspace space(workspace);
    const BackwardProblem of_head = problem_of_head(problem, head, space);
    Backward(of_head, static_cast<char*>(workspace) + space.bytes()).all_gradients(head);
  }

  void key_gradients(int64_t task) {
    const int64_t head = task / key_spans(p_), first = task % key_spans(p_) * kBackwardSpan;
    is_first_ = true;
    for (int64_t tile = 0; tile < p_.tiles(); ++tile) add_tile(head * p_.tiles() + tile, first, true, nullptr, false);
    store_key_gradients(head, first);
  }

  void query_gradients(int64_t task) {
    const QueryTile& tile = tile_of(p_, task);
    bool is_touched = false;
    for (int64_t first = tile.first_key / kBackwardSpan * kBackwardSpan; first < tile.end_key; first += kBackwardSpan) {
      is_touched |= add_tile(task, first, false, grad_query_, is_touched);
    }
    store_query_gradients(task, grad_query_, is_touched);
  }

 private:
  /// The problem of one head, with memory that head_gradients packs its operands into.
  static BackwardProblem problem_of_head(BackwardProblem problem, int64_t head, Workspace& space) {
    problem.first_head = head;
    problem.key_transposed = space.take<E>(Layout<E>::transposed_elements(problem, problem.head_dim));
    problem.value_transposed = space.take<E>(Layout<E>::transposed_elements(problem, problem.value_dim));
    problem.key_rows = space.take<E>(Layout<E>::rows_elements(problem, problem.head_dim));
    problem.nonfinite_keys = space.take<uint64_t>(problem.blocks());
    problem.query_tiles = space.take<char>(problem.tiles() * query_tile_bytes(problem));
    problem.grad_queries = space.take<float>(problem.tiles() * kTileRows * Layout<E>(problem).columns);
    return problem;
  }

  void all_gradients(int64_t head) {
    for (int64_t block = 0; block < p_.blocks(); ++block) pack_keys(head * p_.blocks() + block);
    for (int64_t tile = 0; tile < p_.tiles(); ++tile) pack_queries(head * p_.tiles() + tile);
    const int64_t tile_floats = kTileRows * layout_.columns;
    std::vector<char> is_touched(p_.tiles(), false);
    for (int64_t first = 0; first < p_.key_length; first += kBackwardSpan) {
      is_first_ = true;
      for (int64_t tile = 0; tile < p_.tiles(); ++tile) {
        is_touched[tile] |=
            add_tile(head * p_.tiles() + tile, first, true, p_.grad_queries + tile * tile_floats, is_touched[tile]);
      }
      store_key_gradients(head, first);
    }
    for (int64_t tile = 0; tile < p_.tiles(); ++tile) {
      store_query_gradients(head * p_.tiles() + tile, p_.grad_queries + tile * tile_floats, is_touched[tile]);
    }
  }

  /// A query tile's operands.
  struct TileOperands {
    TileOperands(Workspace& space, const Layout<E>& layout)
        : query(space.take<E>(kTileRows * layout.depth)),
          query_transposed(space.take<E>(kTileRows * layout.depth)),
          grad_out(space.take<E>(kTileRows * layout.value_depth)),
          grad_out_transposed(space.take<E>(kTileRows * layout.value_depth)),
          lse(space.take<float>(kTileRows)),
          delta(space.take<float>(kTileRows)),
          nonfinite_queries(space.take<uint64_t>(1)),
          nonfinite_grads(space.take<uint64_t>(1)) {}

    E *query, *query_transposed;                    // (kTileRows, depth), (depth, kTileRows)
    E *grad_out, *grad_out_transposed;              // (kTileRows, value_depth), (value_depth, kTileRows)
    float *lse, *delta;                             // lse +inf where every weight is 0
    uint64_t *nonfinite_queries, *nonfinite_grads;  // the bits of find_nonfinite_rows
  };

  TileOperands operands_of(int64_t index) const {
    Workspace space(p_.query_tiles + (index - p_.first_head * p_.tiles()) * query_tile_bytes(p_));
    return TileOperands(space, layout_);
  }
  E* key_transposed(int64_t head) const {
    return static_cast<E*>(p_.key_transposed) + (head - p_.first_head) * layout_.tokens * layout_.depth;
  }
  E* value_transposed(int64_t head) const {
    return static_cast<E*>(p_.value_transposed) + (head - p_.first_head) * layout_.tokens * layout_.value_depth;
  }
  E* key_rows(int64_t head) const {
    return static_cast<E*>(p_.key_rows) + (head - p_.first_head) * layout_.tokens * layout_.columns;
  }
  uint64_t* nonfinite_keys(int64_t head) const { return p_.nonfinite_keys + (head - p_.first_head) * p_.blocks(); }

  /// Zeros in the columns of a transposed tile whose bit is set.
  static void clear_columns(uint64_t bits, int64_t depth, E* transposed) {
    for_each_nonfinite(&bits, {0, kTileRows}, [&](int64_t row) {
      for (int64_t i = 0; i < depth; ++i) transposed[i * kTileRows + row] = E(0.0f);
    });
  }

  /// Adds what the pairs of a tile and the keys [first, first + kBackwardSpan) contribute to the gradients of keys and
  /// values, if asked to, and to grad_query, if given. False where there are no such pairs.
  bool add_tile(int64_t index, int64_t first, bool with_keys, float* grad_query, bool is_touched) {
    const QueryTile& tile = tile_of(p_, index);
    int64_t begin = first, end = std::min(first + kBackwardSpan, layout_.tokens);
    while (begin < end && !p_.pair_table->may_meet(tile, begin / kPanel)) begin += kPanel;
    while (begin < end && !p_.pair_table->may_meet(tile, (end - 1) / kPanel)) end = (end - 1) / kPanel * kPanel;
    begin = std::max(begin, tile.first_key / kColumns * kColumns);
    end = std::min(end, round_up(tile.end_key, kColumns));
    if (begin >= end) return false;

    const Span keys{begin, end};
    const int64_t head = index / p_.tiles();
    const TileOperands operands = operands_of(index);
    const TileRows rows(p_, tile);
    const bool is_full = p_.pair_table->is_full(tile, begin, end);
    differentiate(tile, rows, operands, head, keys, is_full);
    if (with_keys) {
      if (is_first_) {
        std::fill_n(grad_key_, layout_.depth * kBackwardSpan, 0.0f);
        std::fill_n(grad_value_, layout_.value_depth * kBackwardSpan, 0.0f);
        is_first_ = false;
      }
      add_to_keys(tile, rows, operands, keys, begin - first, is_full);
    }
    if (grad_query) add_to_queries(tile, rows, operands, head, keys, is_full, grad_query, is_touched);
    return true;
  }

  /// Scores become P, the gradients of P become dS, and both become operands.
  void differentiate(const QueryTile& tile, const TileRows& rows, const TileOperands& operands, int64_t head, Span keys,
                     bool is_full) {
    rows.for_each_group(keys, is_full, [&](Span group, Span group_keys) {
      const int64_t at = group.first * kBackwardSpan + group_keys.first - keys.first;
      products_.with_transposed(group.count(), layout_.depth, operands.query + group.first * layout_.depth,
                                key_transposed(head), group_keys, scores_ + at, kBackwardSpan);
      products_.with_transposed(group.count(), layout_.value_depth,
                                operands.grad_out + group.first * layout_.value_depth, value_transposed(head),
                                group_keys, grad_weights_ + at, kBackwardSpan);
    });
    for (int64_t row = 0; row < tile.rows; ++row) {
      float* score = scores_ + row * kBackwardSpan;
      float* grad = grad_weights_ + row * kBackwardSpan;
      const bool is_empty = operands.lse[row] == kInfinity;
      Span columns = is_full ? Span{0, keys.count()} : rows.columns_of(row, keys);
      if (is_empty) columns = {};
      differentiate_row(whole_vectors(columns), operands.lse[row], operands.delta[row], score, grad);
      if (!is_full || is_empty) clear_forbidden(rows, row, keys, columns, score, grad);
    }
    if constexpr (!kIsInPlace) make_operands(tile.rows, keys.count());
  }

  void add_to_keys(const QueryTile& tile, const TileRows& rows, const TileOperands& operands, Span keys, int64_t offset,
                   bool is_full) {
    const int64_t all_rows = round_up(tile.rows, kVnniWidth);
    for (int64_t column = 0; column < keys.count(); column += kPanel) {
      const int64_t width = std::min(kPanel, keys.count() - column);
      Span used{0, all_rows};  // the rows whose P is not all zero
      if (!is_full) {
        used = rows.rows_of({keys.first + column, keys.first + column + width}, tile.rows);
        if (used.is_empty()) continue;
        used = {used.first / kVnniWidth * kVnniWidth, round_up(used.end, kVnniWidth)};
      }
      const auto [weights, grad_scores, stride] = right_operands(column, used.first, all_rows);
      products_.panel(layout_.value_depth, width, used.count(), operands.grad_out_transposed + used.first, kTileRows,
                      weights, stride, grad_value_ + offset + column, kBackwardSpan, true);
      products_.panel(layout_.depth, width, used.count(), operands.query_transposed + used.first, kTileRows,
                      grad_scores, stride, grad_key_ + offset + column, kBackwardSpan, true);
    }
    const auto add_row = [&](const float* weights, int64_t row, const E* values, int64_t dim, float* grad) {
      if (operands.lse[row] == kInfinity) return;
      for (int64_t key = keys.first; key < keys.end; ++key) {
        if (!rows.allows(row, key)) continue;
        const int64_t column = key - keys.first;
        const float weight = weights[row * kBackwardSpan + column];
        for (int64_t i = 0; i < dim; ++i) {
          grad[i * kBackwardSpan + offset + column] += weight * static_cast<float>(values[i]);
        }
      }
    };
    for_each_nonfinite(operands.nonfinite_grads, {0, tile.rows}, [&](int64_t row) {
      add_row(scores_, row, operands.grad_out + row * layout_.value_depth, p_.value_dim, grad_value_);
    });
    for_each_nonfinite(operands.nonfinite_queries, {0, tile.rows}, [&](int64_t row) {
      add_row(grad_weights_, row, operands.query + row * layout_.depth, p_.head_dim, grad_key_);
    });
  }

  void add_to_queries(const QueryTile& tile, const TileRows& rows, const TileOperands& operands, int64_t head,
                      Span keys, bool is_full, float* grad_query, bool is_touched) {
    const E* grad_scores = grad_scores_rows_;
    if constexpr (kIsInPlace) grad_scores = grad_weights_;
    rows.for_each_group(keys, is_full, [&](Span group, Span group_keys) {
      float* dst = grad_query + group.first * layout_.columns;
      if (group_keys.is_empty()) {
        if (!is_touched) std::fill_n(dst, group.count() * layout_.columns, 0.0f);
        return;
      }
      products_.with_rows(group.count(), layout_.columns,
                          grad_scores + group.first * kBackwardSpan + group_keys.first - keys.first, kBackwardSpan,
                          key_rows(head), layout_.tokens, group_keys, dst, is_touched);
    });
    for_each_nonfinite(nonfinite_keys(head), keys, [&](int64_t key) {
      const T* values = p_.key.at<const T>(tile.batch, key, head % p_.key_heads);
      for (int64_t row = 0; row < tile.rows; ++row) {
        if (operands.lse[row] == kInfinity || !rows.allows(row, key)) continue;
        const float weight = grad_weights_[row * kBackwardSpan + key - keys.first];
        float* dst = grad_query + row * layout_.columns;
        for (int64_t i = 0; i < p_.head_dim; ++i) dst[i] += weight * static_cast<float>(values[i]);
      }
    });
  }

  struct RightOperands {
    const E *weights, *grad_scores;
    int64_t stride;
  };

  /// P and dS of the panel that begins at a column, from a row on, as right operands.
  RightOperands right_operands(int64_t column, int64_t row, int64_t rows) const {
    if constexpr (kIsInPlace) {
      const int64_t at = row * kBackwardSpan + column;
      return {scores_ + at, grad_weights_ + at, kBackwardSpan};
    } else {
      const int64_t at = column * rows + row * kPanel;
      return {weights_operand_ + at, grad_scores_operand_ + at, kPanel};
    }
  }

  /// Scores of whole vectors become P, and their dP becomes dS.
  void differentiate_row(Span span, float lse, float delta, float* score, float* grad) {
    if (rule_.is_prepared) rule_.prepare(score, span, slopes_);
    const Vec unit(rule_.unit), log2e(kLog2e), r_lse(lse), r_delta(delta);
    for (int64_t i = span.first; i < span.end; i += kLanes) {
      // The logit is rounded before lse is subtracted, as lse was: where one key has all the weight, it is exactly 1.
      const Vec weight = exp2((load(score + i) * unit - r_lse) * log2e);
      Vec grad_score = weight * (load(grad + i) - r_delta);
      if (rule_.is_capped) grad_score = grad_score * load(slopes_ + i);
      weight.store(score + i);
      grad_score.store(grad + i);
    }
  }

  /// Zeros in place of a row's P and dS, whatever they are, where the pair is not allowed.
  static void clear_forbidden(const TileRows& rows, int64_t row, Span keys, Span columns, float* weight,
                              float* grad_score) {
    for (float* values : {weight, grad_score}) {
      std::fill(values, values + columns.first, 0.0f);
      std::fill(values + columns.end, values + keys.count(), 0.0f);
      rows.replace_forbidden(row, keys, columns, values, 0.0f);
    }
  }

  /// P and dS in 16 bits: pairs of rows interleaved in panels, and dS in rows as well.
  void make_operands([[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t count) {
#if defined(__AVX512BF16__)
    const int64_t padded = round_up(rows, kVnniWidth);
    const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int64_t row = rows; row < padded; ++row) {
      std::fill_n(scores_ + row * kBackwardSpan, count, 0.0f);
      std::fill_n(grad_weights_ + row * kBackwardSpan, count, 0.0f);
    }
    for (int64_t row = 0; row < padded; row += 2) {
      const float* weight = scores_ + row * kBackwardSpan;
      const float* grad = grad_weights_ + row * kBackwardSpan;
      E* grad_row = grad_scores_rows_ + row * kBackwardSpan;
      for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t unit = i / kPanel * kPanel * padded + row * kPanel + i % kPanel * 2;
        const __m512i p = (__m512i)_mm512_cvtne2ps_pbh(load(weight + i + kBackwardSpan), load(weight + i));
        const __m512i ds = (__m512i)_mm512_cvtne2ps_pbh(load(grad + i + kBackwardSpan), load(grad + i));
        _mm512_storeu_si512(weights_operand_ + unit, _mm512_permutexvar_epi16(interleaved, p));
        _mm512_storeu_si512(grad_scores_operand_ + unit, _mm512_permutexvar_epi16(interleaved, ds));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(grad_row + i), _mm512_castsi512_si256(ds));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(grad_row + i + kBackwardSpan), _mm512_extracti64x4_epi64(ds, 1));
      }
    }
#endif
  }

  void store_key_gradients(int64_t head, int64_t first) {
    const int64_t batch = head / p_.key_heads, key_head = head % p_.key_heads;
    const int64_t count = std::min(kBackwardSpan, p_.key_length - first);
    store_transposed(p_.grad_key.at<T>(batch, first, key_head), p_.grad_key.token_stride, count, p_.head_dim, p_.scale,
                     grad_key_);
    store_transposed(p_.grad_value.at<T>(batch, first, key_head), p_.grad_value.token_stride, count, p_.value_dim, 1.0,
                     grad_value_);
  }

  /// dst[count][dim] = factor * the transpose of src[dim][kBackwardSpan]; zeros where nothing was summed up.
  void store_transposed(T* dst, int64_t stride, int64_t count, int64_t dim, double factor, const float* src) {
    if (!is_first_) transpose_words(src, kBackwardSpan, dim, count, staging_, dim);
    for (int64_t token = 0; token < count; ++token) {
      if (is_first_) {
        std::fill_n(dst + token * stride, dim, T(0.0f));
      } else {
        store_scaled(staging_ + token * dim, factor, dst + token * stride, dim);
      }
    }
  }

  void store_scaled(const float* src, double factor, T* dst, int64_t count) const {
    if (!rule_.is_wide) return convert_scaled(src, static_cast<float>(factor), dst, count);
    for (int64_t i = 0; i < count; ++i) dst[i] = static_cast<T>(static_cast<float>(src[i] * factor));
  }

  void store_query_gradients(int64_t index, const float* grad_query, bool is_touched) {
    const QueryTile& tile = tile_of(p_, index);
    const int64_t group = p_.group, key_head = index / p_.tiles() % p_.key_heads;
    for (int64_t row = 0; row < tile.rows; ++row) {
      T* dst = p_.grad_query.at<T>(tile.batch, (tile.first_row + row) / group,
                                   key_head * group + (tile.first_row + row) % group);
      if (is_touched) {
        store_scaled(grad_query + row * layout_.columns, p_.scale, dst, p_.head_dim);
      } else {
        std::fill_n(dst, p_.head_dim, T(0.0f));
      }
    }
  }

  const BackwardProblem& p_;
  const Layout<E> layout_;
  const Products<E> products_;
  const LogitRule rule_;
  Workspace space_;
  float *staging_, *scores_, *grad_weights_, *slopes_;
  E *weights_operand_ = nullptr, *grad_scores_operand_ = nullptr, *grad_scores_rows_ = nullptr;
  float *grad_key_, *grad_value_, *grad_query_;
  bool is_first_ = true;
};

}  // namespace CPU_CAPABILITY
}  // namespace selfattn::cpu
