#pragma once

// Backward: P = exp2(logit - lse), dS = P * (dP - delta) with dP = dO V^T and delta = rowsum(dO * O) - dlse; then
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
  static constexpr int64_t kPair = Operand<E>::kPair;

 public:
  Backward(const BackwardProblem& problem, void* workspace)
      : p_(problem), layout_(problem), products_{problem}, rule_(problem), space_(workspace),
        workspace_(static_cast<char*>(workspace)) {
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
    // Last, since only head_gradients needs it: the gradients of all queries of a batch entry's group.
    head_offset_ = space_.bytes();
  }

  int64_t workspace_bytes(bool whole_heads) const {
    if (!whole_heads) return head_offset_;
    return head_offset_ + most_tiles() * kTileRows * layout_.columns * static_cast<int64_t>(sizeof(float));
  }

  static int64_t key_spans(const FlashProblem& problem) {
    return round_up(problem.key_length, kBackwardSpan) / kBackwardSpan;
  }

  static int64_t query_tile_bytes(const FlashProblem& problem) {
    Workspace space(nullptr);
    TileOperands(space, Layout<E>(problem));
    return space.bytes();
  }

  void pack_keys(int64_t task) {
    const int64_t block = task % p_.blocks(), head = task / p_.blocks(), first = block * kPanel;
    const int64_t batch = head / p_.key_heads, key_head = head % p_.key_heads;
    const int64_t count = std::min(kPanel, p_.key_length - first);
    E* staging = reinterpret_cast<E*>(staging_);
    const auto key = as_operand(p_.key.at<const T>(batch, first, key_head), p_.key.token_stride, count, p_.head_dim,
                                layout_.depth, staging);
    pack_transposed(key, count, layout_.depth, key_transposed(head) + first * layout_.depth);
    pack_rows(key, count, p_.head_dim, first, layout_.tokens, key_rows(head));
    const auto value = as_operand(p_.value.at<const T>(batch, first, key_head), p_.value.token_stride, count,
                                  p_.value_dim, layout_.value_depth, staging);
    pack_transposed(value, count, layout_.value_depth, value_transposed(head) + first * layout_.value_depth);
  }

  void pack_queries(int64_t task) {
    const QueryTile& tile = p_.plan->tiles[task % p_.tiles()];
    const int64_t head = task / p_.tiles(), group = p_.group();
    const TileOperands operands = operands_of(task);
    float* out = staging_;
    float* grad_out = staging_ + p_.value_dim;
    for (int64_t row = 0; row < kTileRows; ++row) {
      E* query = operands.query + row * layout_.depth;
      E* grad = operands.grad_out + row * layout_.value_depth;
      if (row >= tile.rows) {
        std::fill_n(query, layout_.depth, E(0.0f));
        std::fill_n(grad, layout_.value_depth, E(0.0f));
        continue;
      }
      const int64_t token = (tile.first_row + row) / group, query_head = head * group + (tile.first_row + row) % group;
      copy_row(p_.query.at<const T>(tile.batch, token, query_head), p_.head_dim, layout_.depth, query);
      const T* grad_row = p_.grad_out.at<const T>(tile.batch, token, query_head);
      copy_row(grad_row, p_.value_dim, layout_.value_depth, grad);
      convert(p_.out.at<const T>(tile.batch, token, query_head), out, p_.value_dim);
      convert(grad_row, grad_out, p_.value_dim);
      const int64_t index = (tile.batch * p_.query_heads + query_head) * p_.query_length + token;
      operands.delta[row] = dot(out, grad_out, p_.value_dim) - (p_.grad_lse ? p_.grad_lse[index] : 0.0f);
      // A row that attends to nothing: every weight is exp2(-inf) = 0.
      operands.lse[row] = p_.lse[index] == -kInfinity ? kInfinity : p_.lse[index] * kLog2e;
    }
    transpose_tile(operands.query, layout_.depth, operands.query_transposed);
    transpose_tile(operands.grad_out, layout_.value_depth, operands.grad_out_transposed);
  }

  void head_gradients(int64_t task) {
    const int64_t batch = task / p_.key_heads, head = task % p_.key_heads;
    const int64_t first_tile = p_.plan->first_tile[batch], tiles = p_.plan->first_tile[batch + 1] - first_tile;
    const int64_t tile_floats = kTileRows * layout_.columns;
    float* grad_queries = reinterpret_cast<float*>(workspace_ + head_offset_);
    std::vector<char> is_touched(tiles, false);
    for (int64_t first = 0; first < p_.key_length; first += kBackwardSpan) {
      is_first_ = true;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        add_tile(head, first_tile + tile, first, true, grad_queries + tile * tile_floats, is_touched[tile]);
      }
      store_key_gradients(batch, head, first);
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      store_query_gradients(p_.plan->tiles[first_tile + tile], head, grad_queries + tile * tile_floats,
                            is_touched[tile]);
    }
  }

  void key_gradients(int64_t task) {
    const int64_t spans = key_spans(p_);
    const int64_t span = task % spans, batch = task / spans / p_.key_heads, head = task / spans % p_.key_heads;
    char unused = false;
    is_first_ = true;
    for (int64_t tile = p_.plan->first_tile[batch]; tile < p_.plan->first_tile[batch + 1]; ++tile) {
      add_tile(head, tile, span * kBackwardSpan, true, nullptr, unused);
    }
    store_key_gradients(batch, head, span * kBackwardSpan);
  }

  void query_gradients(int64_t task) {
    const int64_t tile = task % p_.tiles(), head = task / p_.tiles();
    const QueryTile& queries = p_.plan->tiles[tile];
    char is_touched = false;
    for (int64_t first = queries.first_key / kBackwardSpan * kBackwardSpan; first < queries.end_key;
         first += kBackwardSpan) {
      add_tile(head, tile, first, false, grad_query_, is_touched);
    }
    store_query_gradients(queries, head, grad_query_, is_touched);
  }

 private:
  /// A query tile's operands.
  struct TileOperands {
    TileOperands(Workspace& space, const Layout<E>& layout)
        : query(space.take<E>(kTileRows * layout.depth)),
          query_transposed(space.take<E>(kTileRows * layout.depth)),
          grad_out(space.take<E>(kTileRows * layout.value_depth)),
          grad_out_transposed(space.take<E>(kTileRows * layout.value_depth)),
          lse(space.take<float>(kTileRows)),
          delta(space.take<float>(kTileRows)) {}

    E *query, *query_transposed;        // (kTileRows, depth), (depth, kTileRows)
    E *grad_out, *grad_out_transposed;  // (kTileRows, value_depth), (value_depth, kTileRows)
    float *lse, *delta;                 // lse in units of log2
  };

  TileOperands operands_of(int64_t index) const {
    Workspace space(p_.query_tiles + index * query_tile_bytes(p_));
    return TileOperands(space, layout_);
  }

  E* key_transposed(int64_t head) const {
    return static_cast<E*>(p_.key_transposed) + head * layout_.tokens * layout_.depth;
  }
  E* value_transposed(int64_t head) const {
    return static_cast<E*>(p_.value_transposed) + head * layout_.tokens * layout_.value_depth;
  }
  E* key_rows(int64_t head) const { return static_cast<E*>(p_.key_rows) + head * layout_.tokens * layout_.columns; }

  int64_t most_tiles() const {
    int64_t most = 0;
    for (int64_t batch = 0; batch < p_.batch; ++batch) {
      most = std::max(most, p_.plan->first_tile[batch + 1] - p_.plan->first_tile[batch]);
    }
    return most;
  }

  static void copy_row(const T* src, int64_t dim, int64_t depth, E* dst) {
    const auto rows = as_operand(src, 0, 1, dim, depth, dst);
    if (rows.data != dst) std::copy_n(rows.data, depth, dst);
  }

  static float dot(const float* a, const float* b, int64_t count) {
    Vec r_sum(0.0f);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) r_sum = at::vec::fmadd(load(a + i), load(b + i), r_sum);
    float total = sum(r_sum);
    for (; i < count; ++i) total += a[i] * b[i];
    return total;
  }

  /// Adds what the pairs of a tile and the keys [first, first + kBackwardSpan) contribute to the gradients.
  void add_tile(int64_t head, int64_t tile_index, int64_t first, bool with_keys, float* grad_query, char& is_touched) {
    const QueryTile& tile = p_.plan->tiles[tile_index];
    int64_t begin = first, end = std::min(first + kBackwardSpan, layout_.tokens);
    while (begin < end && !p_.plan->may_meet(tile, begin / kPanel)) begin += kPanel;
    while (begin < end && !p_.plan->may_meet(tile, (end - 1) / kPanel)) end = (end - 1) / kPanel * kPanel;
    begin = std::max(begin, tile.first_key / p_.key_step * p_.key_step);
    end = std::min(end, round_up(tile.end_key, p_.key_step));
    if (begin >= end) return;

    const int64_t key_head = tile.batch * p_.key_heads + head, count = end - begin;
    const TileOperands operands = operands_of(head * p_.tiles() + tile_index);
    products_.with_transposed(tile.rows, layout_.depth, operands.query, layout_.depth, key_transposed(key_head), begin,
                              end, scores_, kBackwardSpan);
    products_.with_transposed(tile.rows, layout_.value_depth, operands.grad_out, layout_.value_depth,
                              value_transposed(key_head), begin, end, grad_weights_, kBackwardSpan);
    differentiate(tile, operands, begin, count);

    if (with_keys) {
      const int64_t offset = begin - first, rows = round_up(tile.rows, std::max(kPair, p_.row_step));
      if (is_first_) {
        std::fill_n(grad_key_, layout_.depth * kBackwardSpan, 0.0f);
        std::fill_n(grad_value_, layout_.value_depth * kBackwardSpan, 0.0f);
        is_first_ = false;
      }
      for (int64_t column = 0; column < count; column += kPanel) {
        const int64_t width = std::min(kPanel, count - column);
        const auto [weights, grad_scores, stride] = right_operands(column, rows);
        products_.panel(layout_.value_depth, width, rows, operands.grad_out_transposed, kTileRows, weights, stride,
                        grad_value_ + offset + column, kBackwardSpan, true);
        products_.panel(layout_.depth, width, rows, operands.query_transposed, kTileRows, grad_scores, stride,
                        grad_key_ + offset + column, kBackwardSpan, true);
      }
    }
    if (grad_query) {
      const E* grad_scores = grad_scores_rows_;
      if constexpr (kIsInPlace) grad_scores = grad_weights_;
      products_.with_rows(tile.rows, layout_.columns, grad_scores, kBackwardSpan, key_rows(key_head), layout_.tokens,
                          begin, end, grad_query, layout_.columns, is_touched);
      is_touched = true;
    }
  }

  struct RightOperands {
    const E *weights, *grad_scores;
    int64_t stride;
  };

  /// P and dS of the panel that begins at a column, as right operands.
  RightOperands right_operands(int64_t column, int64_t rows) const {
    if constexpr (kIsInPlace) {
      return {scores_ + column, grad_weights_ + column, kBackwardSpan};
    } else {
      return {weights_operand_ + column * rows, grad_scores_operand_ + column * rows, kPanel};
    }
  }

  /// Scores become P and the gradients of P become dS, and both become operands.
  void differentiate(const QueryTile& tile, const TileOperands& operands, int64_t begin, int64_t count) {
    const TileRows rows(p_, tile);
    const bool is_full = p_.plan->is_full(tile, begin, begin + count);
    const int32_t* key_ids = p_.key_ids ? p_.key_ids + tile.batch * p_.key_length : nullptr;
    for (int64_t row = 0; row < tile.rows; ++row) {
      float* score = scores_ + row * kBackwardSpan;
      float* grad = grad_weights_ + row * kBackwardSpan;
      const Span span = slope_and_mask_row(rows, row, key_ids, begin, count, is_full, score);
      differentiate_row(span, operands.lse[row], operands.delta[row], score, grad);
      for (float* values : {score, grad}) {
        std::fill(values, values + span.first, 0.0f);
        std::fill(values + span.end, values + count, 0.0f);
      }
    }
    if constexpr (!kIsInPlace) make_operands(tile.rows, count);
  }

  /// mask_row that also keeps the derivative of the cap, 1 - tanh^2.
  Span slope_and_mask_row(const TileRows& rows, int64_t row, const int32_t* key_ids, int64_t begin, int64_t count,
                          bool is_full, float* score) {
    if (rule_.is_capped) {
      for (int64_t i = 0; i < count; i += kLanes) {
        const Vec tanh = (load(score + i) * Vec(rule_.inner)).tanh();
        (Vec(1.0f) - tanh * tanh).store(slopes_ + i);
      }
    }
    return mask_row(rows, row, key_ids, begin, count, is_full, rule_, score);
  }

  void differentiate_row(Span span, float lse, float delta, float* score, float* grad) {
    const Vec factor(rule_.factor), minus_lse(-lse), r_delta(delta);
    for (int64_t i = span.first; i < span.end; i += kLanes) {
      const Vec weight = exp2(at::vec::fmadd(load(score + i), factor, minus_lse));
      Vec grad_score = weight * (load(grad + i) - r_delta);
      if (rule_.is_capped) grad_score = grad_score * load(slopes_ + i);
      weight.store(score + i);
      grad_score.store(grad + i);
    }
  }

  /// P and dS in 16 bits: pairs of rows interleaved in panels, and dS in rows as well.
  void make_operands(int64_t rows, int64_t count) {
#if defined(__AVX512BF16__)
    const int64_t padded = round_up(rows, std::max(kPair, p_.row_step));
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

  void store_key_gradients(int64_t batch, int64_t head, int64_t first) {
    const int64_t count = std::min(kBackwardSpan, p_.key_length - first);
    store_transposed(p_.grad_key.at<T>(batch, first, head), p_.grad_key.token_stride, count, p_.head_dim, p_.scale,
                     grad_key_);
    store_transposed(p_.grad_value.at<T>(batch, first, head), p_.grad_value.token_stride, count, p_.value_dim, 1.0f,
                     grad_value_);
  }

  /// dst[count][dim] = factor * the transpose of src[dim][kBackwardSpan]; zeros where nothing was summed up.
  void store_transposed(T* dst, int64_t stride, int64_t count, int64_t dim, float factor, const float* src) {
    if (!is_first_) transpose_words(src, kBackwardSpan, dim, count, staging_, dim);
    for (int64_t token = 0; token < count; ++token) {
      if (is_first_) {
        std::fill_n(dst + token * stride, dim, T(0.0f));
      } else {
        convert_scaled(staging_ + token * dim, factor, dst + token * stride, dim);
      }
    }
  }

  void store_query_gradients(const QueryTile& tile, int64_t head, const float* grad_query, bool is_touched) {
    const int64_t group = p_.group();
    for (int64_t row = 0; row < tile.rows; ++row) {
      T* dst = p_.grad_query.at<T>(tile.batch, (tile.first_row + row) / group,
                                   head * group + (tile.first_row + row) % group);
      if (is_touched) {
        convert_scaled(grad_query + row * layout_.columns, p_.scale, dst, p_.head_dim);
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
  char* workspace_;
  int64_t head_offset_;
  float *staging_, *scores_, *grad_weights_, *slopes_;
  E *weights_operand_ = nullptr, *grad_scores_operand_ = nullptr, *grad_scores_rows_ = nullptr;
  float *grad_key_, *grad_value_, *grad_query_;
  bool is_first_ = true;
};

}  // namespace CPU_CAPABILITY
}  // namespace selfattn::cpu
