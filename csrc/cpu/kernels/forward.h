#pragma once

// Forward: a tile of queries walks over its keys in spans, with the online softmax.
#include "cpu/kernels/score_tile.h"

namespace selfattn::cpu {
inline namespace CPU_CAPABILITY {

constexpr int64_t kForwardSpan = 256;  // keys whose scores are held at once

template <typename T, typename E>
class Forward {
  static constexpr bool kIsInPlace = std::is_same_v<E, float>;  // weights take the place of the scores

 public:
  Forward(const ForwardProblem& problem, void* workspace)
      : p_(problem), layout_(problem), products_{problem}, rule_(problem.scale, problem.softcap), space_(workspace) {
    staging_ = space_.take<E>(kPanel * std::max(layout_.depth, layout_.value_columns));
    query_ = space_.take<E>(kTileRows * layout_.depth);
    scores_ = space_.take<float>(kTileRows * kForwardSpan);
    weights_ = kIsInPlace ? nullptr : space_.take<E>(kTileRows * kForwardSpan);
    state_ = SoftmaxRows::in(space_.take<float>(part_floats(problem)), kTileRows, layout_.value_columns);
    if (!problem.key_transposed) {
      local_nonfinite_ = space_.take<uint64_t>(kForwardSpan / kPanel);
      local_key_ = space_.take<E>(kForwardSpan * layout_.depth);
      local_value_ = space_.take<E>(kForwardSpan * layout_.value_columns);
    }
  }

  int64_t workspace_bytes() const { return space_.bytes(); }

  /// Bytes of the workspace of attend_head.
  static int64_t head_workspace_bytes(const ForwardProblem& problem) {
    Workspace space(nullptr);
    problem_of_head(problem, 0, space);
    return space.bytes() + Forward(problem, nullptr).workspace_bytes();
  }

  /// All tiles of a head, packing included.
  static void attend_head(const ForwardProblem& problem, int64_t head, void* workspace) {
    Workspace space(workspace);
    const ForwardProblem of_head = problem_of_head(problem, head, space);
    Forward forward(of_head, static_cast<char*>(workspace) + space.bytes());
    for (int64_t block = 0; block < problem.blocks(); ++block) forward.pack(head * problem.blocks() + block);
    for (int64_t tile = 0; tile < problem.tiles(); ++tile) forward.attend(head * problem.tiles() + tile);
  }

  static int64_t part_floats(const FlashProblem& problem) {
    return SoftmaxRows::floats(kTileRows, Layout<E>(problem).value_columns);
  }

  /// Packs one key block.
  void pack(int64_t task) {
    const int64_t first = task % p_.blocks() * kPanel, head = task / p_.blocks();
    nonfinite_of(head)[first / kPanel] =
        pack_block(head, first, key_of(head) + first * layout_.depth, first, layout_.tokens, value_of(head));
  }

  void attend(int64_t task) {
    const int64_t split = task % p_.splits, head = task / p_.splits / p_.tiles();
    const QueryTile& tile = tile_of(p_, task / p_.splits);
    // Parts of equal numbers of keys, in whole steps.
    const int64_t begin = tile.first_key / kColumns * kColumns;
    const int64_t end = std::min(round_up(tile.end_key, kColumns), layout_.tokens);
    const int64_t length = round_up((end - begin + p_.splits - 1) / p_.splits, kColumns);
    start(tile, head);
    walk(tile, head, begin + split * length, std::min(begin + (split + 1) * length, end));
    if (!p_.parts) return finish(tile, head);
    state_.copy_to(part(task), tile.rows);
  }

  /// Merges the parts of a tile.
  void merge(int64_t task) {
    const QueryTile& tile = tile_of(p_, task);
    const SoftmaxRows first = part(task * p_.splits);
    for (int64_t row = 0; row < tile.rows; ++row) state_.merge(rule_, row, first, part_floats(p_), p_.splits);
    finish(tile, task / p_.tiles());
  }

 private:
  SoftmaxRows part(int64_t index) const {
    return SoftmaxRows::in(p_.parts + index * part_floats(p_), kTileRows, layout_.value_columns);
  }

  /// The problem of one head, with memory that attend_head packs its operands into.
  static ForwardProblem problem_of_head(ForwardProblem problem, int64_t head, Workspace& space) {
    problem.first_head = head;
    problem.key_transposed = space.take<E>(Layout<E>::transposed_elements(problem, problem.head_dim));
    problem.value_rows = space.take<E>(Layout<E>::rows_elements(problem, problem.value_dim));
    problem.nonfinite_values = space.take<uint64_t>(problem.blocks());
    return problem;
  }

  /// Packed keys and values, of a whole head or of one span only, whose first token is `origin`.
  struct KeyOperands {
    const E *key, *value;
    const uint64_t* nonfinite_values;
    int64_t tokens, origin;
  };

  E* key_of(int64_t head) const {
    return static_cast<E*>(p_.key_transposed) + (head - p_.first_head) * layout_.tokens * layout_.depth;
  }
  E* value_of(int64_t head) const {
    return static_cast<E*>(p_.value_rows) + (head - p_.first_head) * layout_.tokens * layout_.value_columns;
  }
  uint64_t* nonfinite_of(int64_t head) const { return p_.nonfinite_values + (head - p_.first_head) * p_.blocks(); }

  /// Packs a block and returns which of its values are not finite (see find_nonfinite_rows): they are packed as zeros.
  uint64_t pack_block(int64_t head, int64_t first, E* key, int64_t value_first, int64_t value_tokens, E* value) {
    const int64_t batch = head / p_.key_heads, key_head = head % p_.key_heads;
    const int64_t count = std::min(kPanel, p_.key_length - first);
    const auto key_rows = as_operand(p_.key.at<const T>(batch, first, key_head), p_.key.token_stride, count,
                                     p_.head_dim, layout_.depth, staging_);
    pack_transposed(key_rows, count, layout_.depth, key);
    const T* values = p_.value.at<const T>(batch, first, key_head);
    const uint64_t nonfinite = find_nonfinite_rows(values, p_.value.token_stride, count, p_.value_dim);
    auto value_rows = as_operand(values, p_.value.token_stride, count, p_.value_dim, p_.value_dim, staging_);
    if (nonfinite) value_rows = without_rows(nonfinite, value_rows, count, p_.value_dim, staging_);
    pack_rows(value_rows, count, p_.value_dim, value_first, value_tokens, value);
    return nonfinite;
  }

  /// Reads the queries of a tile.
  void start(const QueryTile& tile, int64_t head) {
    const int64_t group = p_.group;
    for (int64_t row = 0; row < tile.rows; ++row) {
      const int64_t token = (tile.first_row + row) / group, in_group = (tile.first_row + row) % group;
      const T* src = p_.query.at<const T>(tile.batch, token, head % p_.key_heads * group + in_group);
      copy_row(src, p_.head_dim, layout_.depth, query_ + row * layout_.depth);
    }
    state_.start(tile.rows);
    is_first_ = true;
  }

  /// The keys [begin, end) in spans that leave out the blocks that no pair may meet in.
  void walk(const QueryTile& tile, int64_t head, int64_t begin, int64_t end) {
    const TileRows rows(p_, tile);
    for (int64_t first = begin; first < end;) {
      const int64_t block = first / kPanel;
      if (!p_.pair_table->may_meet(tile, block)) {
        first = (block + 1) * kPanel;
        continue;
      }
      const int64_t limit = std::min(end, first + kForwardSpan);
      int64_t last = std::min((block + 1) * kPanel, limit);
      while (last < limit && p_.pair_table->may_meet(tile, last / kPanel)) last = std::min(last + kPanel, limit);
      attend_span(tile, rows, head, {first, last});
      first = last;
    }
  }

  void attend_span(const QueryTile& tile, const TileRows& rows, int64_t head, Span keys) {
    KeyOperands operands{local_key_, local_value_, local_nonfinite_, kForwardSpan, keys.first};
    if (p_.key_transposed) {
      operands = {key_of(head), value_of(head), nonfinite_of(head), layout_.tokens, 0};
    } else {
      for (int64_t token = keys.first; token < keys.end; token += kPanel) {
        const int64_t local = token - keys.first;
        local_nonfinite_[local / kPanel] =
            pack_block(head, token, local_key_ + local * layout_.depth, local, kForwardSpan, local_value_);
      }
    }
    const bool is_full = p_.pair_table->is_full(tile, keys.first, keys.end);
    rows.for_each_group(keys, is_full, [&](Span group, Span group_keys) {
      attend_rows(tile, rows, head, operands, group, group_keys, is_full);
    });
    is_first_ = false;
  }

  /// Scores, their softmax and its product with the values, of some rows and keys.
  void attend_rows(const QueryTile& tile, const TileRows& rows, int64_t head, const KeyOperands& operands, Span group,
                   Span keys, bool is_full) {
    float* out = state_.out_of(group.first);
    if (keys.is_empty()) {
      if (is_first_) std::fill_n(out, group.count() * layout_.value_columns, 0.0f);
      return;
    }
    const Span local{keys.first - operands.origin, keys.end - operands.origin};
    products_.with_transposed(group.count(), layout_.depth, query_ + group.first * layout_.depth, operands.key, local,
                              scores_, kForwardSpan);
    for (int64_t row = group.first; row < group.end; ++row) {
      float* score = scores_ + (row - group.first) * kForwardSpan;
      const Span span = mask_row(rows, row, keys, is_full, rule_, score);
      state_.add(rule_, row, span, keys.count(), score, weights(row - group.first));
    }
    products_.with_rows(group.count(), layout_.value_columns, weights(0), kForwardSpan, operands.value, operands.tokens,
                        local, out, !is_first_);
    for_each_nonfinite(operands.nonfinite_values, local, [&](int64_t token) {
      const int64_t key = token + operands.origin;
      const T* value = p_.value.at<const T>(tile.batch, key, head % p_.key_heads);
      for (int64_t row = group.first; row < group.end; ++row) {
        if (!rows.allows(row, key)) continue;
        const float weight = static_cast<float>(weights(row - group.first)[key - keys.first]);
        for (int64_t i = 0; i < p_.value_dim; ++i) {
          state_.out_of(row)[i] += weight * static_cast<float>(value[i]);
        }
      }
    });
  }

  E* weights(int64_t row) {
    if constexpr (kIsInPlace) {
      return scores_ + row * kForwardSpan;
    } else {
      return weights_ + row * kForwardSpan;
    }
  }

  /// Divides by the sums and writes out and lse. A sink takes part in the sum only.
  void finish(const QueryTile& tile, int64_t head) {
    const int64_t group = p_.group;
    for (int64_t row = 0; row < tile.rows; ++row) {
      const int64_t token = (tile.first_row + row) / group, in_group = (tile.first_row + row) % group;
      const int64_t query_head = head % p_.key_heads * group + in_group;
      T* out = p_.out.at<T>(tile.batch, token, query_head);
      float& lse = p_.lse[(tile.batch * p_.query_heads + query_head) * p_.query_length + token];
      state_.finish(rule_, row, p_.sinks ? p_.sinks + query_head : nullptr, out, p_.value_dim, lse);
    }
  }

  const ForwardProblem& p_;
  const Layout<E> layout_;
  const Products<E> products_;
  const LogitRule rule_;
  Workspace space_;
  E *staging_, *query_, *weights_;
  E *local_key_ = nullptr, *local_value_ = nullptr;
  uint64_t* local_nonfinite_ = nullptr;
  float* scores_;
  SoftmaxRows state_;
  bool is_first_ = true;
};

}  // namespace CPU_CAPABILITY
}  // namespace selfattn::cpu
