// Compiled once for each instruction set: see cmake/cpu_kernels.cmake.
#include "cpu/kv_cache_kernels.h"

#include "cpu/kernels/kv_cache_products.h"
#include "cpu/kernels/softmax.h"
#include "cpu/kernels/workspace.h"

namespace selfattn::cpu {
inline namespace CPU_CAPABILITY {

inline bool may_attend(const CacheQuery& query, int64_t key, int64_t first_draft_key) {
  if (query.first_key <= key && key < query.end_key) return true;
  const int64_t draft = key - first_draft_key;
  return 0 <= draft && draft < 32 && (query.draft_keys >> draft & 1);
}

/// One task: a tile of queries walks over a chunk of keys in spans, and in each span over the key heads, so that memory
/// is read in the order of the tokens.
template <typename T, typename E>
class KvCacheAttention {
  using Op = CacheOperand<T, E>;
  static constexpr bool kIsInPlace = std::is_same_v<E, float>;  // weights take the place of the scores

 public:
  KvCacheAttention(const KvCacheKernelProblem& problem, void* workspace)
      : p_(problem),
        depth_(round_up(problem.head_dim, Op::kStep)),
        columns_(value_columns(problem)),
        rule_(problem.scale, problem.softcap),
        space_(workspace) {
    query_ = space_.take<E>(p_.heads_per_task * p_.tile_rows * depth_);
    scores_ = space_.take<float>(p_.tile_rows * kCacheSpan);
    weights_ = kIsInPlace ? nullptr : space_.take<E>(p_.tile_rows * kCacheSpan);
    states_ = space_.take<float>(part_floats(problem));
  }

  static int64_t part_floats(const KvCacheKernelProblem& problem) {
    return problem.heads_per_task * SoftmaxRows::floats(problem.tile_rows, value_columns(problem));
  }
  int64_t workspace_bytes() const { return space_.bytes(); }

  void attend(int64_t task) {
    const CacheTile& tile =
        *std::prev(std::upper_bound(p_.tiles, p_.tiles + p_.tile_count, task,
                                    [](int64_t index, const CacheTile& t) { return index < t.first_task; }));
    const int64_t head_task = (task - tile.first_task) % p_.head_tasks();
    const int64_t chunk = tile.first_chunk + (task - tile.first_task) / p_.head_tasks();
    heads_ = {head_task * p_.heads_per_task, std::min((head_task + 1) * p_.heads_per_task, p_.key_heads)};
    const bool is_part = tile.chunks > 1;
    float* const states = is_part ? p_.parts + task * part_floats(p_) : states_;
    start(tile, states);
    walk(tile, {std::max(tile.first_key, chunk * p_.chunk_keys), std::min(tile.end_key, (chunk + 1) * p_.chunk_keys)},
         states);
    if (!is_part) return finish(tile, states);
    // Whoever counts the last part sees all others, which were written before they were counted.
    std::atomic<int32_t>& arrivals = p_.arrivals[tile.first_task + head_task];
    if (arrivals.fetch_add(1, std::memory_order_acq_rel) + 1 == tile.chunks) merge(tile, head_task);
  }

 private:
  static int64_t value_columns(const KvCacheKernelProblem& problem) { return round_up(problem.value_dim, Op::kStep); }

  const CacheQuery& query_of(const CacheTile& tile, int64_t row) const {
    return p_.queries[tile.first_query + (tile.first_row + row) / p_.group()];
  }
  int64_t query_head(const CacheTile& tile, int64_t row, int64_t head) const {
    return head * p_.group() + (tile.first_row + row) % p_.group();
  }
  E* query_rows(int64_t head) const { return query_ + (head - heads_.first) * p_.tile_rows * depth_; }
  SoftmaxRows state_of(float* states, int64_t head) const {
    return SoftmaxRows::in(states + (head - heads_.first) * SoftmaxRows::floats(p_.tile_rows, columns_), p_.tile_rows,
                           columns_);
  }

  void start(const CacheTile& tile, float* states) {
    for (int64_t head = heads_.first; head < heads_.end; ++head) {
      for (int64_t row = 0; row < tile.rows; ++row) {
        const CacheQuery& query = query_of(tile, row);
        const T* src = p_.query.at<const T>(query.batch, query.token, query_head(tile, row, head));
        copy_row(src, p_.head_dim, depth_, query_rows(head) + row * depth_);
      }
      const SoftmaxRows state = state_of(states, head);
      state.start(tile.rows);
      std::fill_n(state.out, tile.rows * columns_, 0.0f);
    }
  }

  /// Where the rows of a span lie, counted from the first one of their head.
  struct RowOffsets {
    int64_t key[kCacheSpan], value[kCacheSpan];
  };

  void walk(const CacheTile& tile, Span keys, float* states) {
    const auto span_from = [&](int64_t first) {
      return Span{first, std::min(first / kCacheSpan * kCacheSpan + kCacheSpan, keys.end)};
    };
    RowOffsets offsets, next_offsets;
    if (!keys.is_empty()) locate(tile, span_from(keys.first), next_offsets);
    for (Span span = span_from(keys.first); !span.is_empty(); span = span_from(span.end)) {
      offsets = next_offsets;
      if (span.end < keys.end) locate(tile, span_from(span.end), next_offsets);
      for (int64_t head = heads_.first; head < heads_.end; ++head) {
        const bool is_last_head = head + 1 == heads_.end;
        const T *const key_base = key_of(head), *const value_base = value_of(head);
        const T* const next_base = key_of(is_last_head ? heads_.first : head + 1);
        const int64_t* const next_key = is_last_head ? next_offsets.key : offsets.key;
        for (int64_t i = 0; i < kCacheSpan; ++i) {
          keys_[i] = key_base + offsets.key[i];
          values_[i] = value_base + offsets.value[i];
          next_keys_[i] = next_base + next_key[i];
        }
        attend_span(tile, span, head, states);
      }
    }
  }

  const T* key_of(int64_t head) const { return static_cast<const T*>(p_.key.data) + head * p_.key.head_stride; }
  const T* value_of(int64_t head) const { return static_cast<const T*>(p_.value.data) + head * p_.value.head_stride; }

  /// The last key stands in for those after it, so that vectors of scores are whole.
  void locate(const CacheTile& tile, Span span, RowOffsets& offsets) const {
    for (int64_t token = span.first; token < span.end;) {
      const int64_t page = token / p_.page_size, end = std::min((page + 1) * p_.page_size, span.end);
      const int64_t place = p_.page_table ? p_.page_table[tile.cache_row * p_.pages_per_row + page] : tile.cache_row;
      for (int64_t in_page = token - page * p_.page_size; token < end; ++token, ++in_page) {
        offsets.key[token - span.first] = place * p_.key.page_stride + in_page * p_.key.token_stride;
        offsets.value[token - span.first] = place * p_.value.page_stride + in_page * p_.value.token_stride;
      }
    }
    std::fill(offsets.key + span.count(), offsets.key + kCacheSpan, offsets.key[span.count() - 1]);
    std::fill(offsets.value + span.count(), offsets.value + kCacheSpan, offsets.value[span.count() - 1]);
  }

  /// Each product fetches what the next one reads: scores the values, weighted values the next head's keys.
  void attend_span(const CacheTile& tile, Span span, int64_t head, float* states) {
    const int64_t count = span.count(), lanes = round_up(count, kLanes);
    const E* const query = query_rows(head);
    for (int64_t key = 0; key < lanes; key += kLanes) {
      for_row_groups(tile.rows, [&]<int kRows>(int64_t row) {
        score_rows<kRows>(query + row * depth_, depth_, keys_ + key, p_.head_dim, scores_ + row * kCacheSpan + key,
                          kCacheSpan, row == 0 ? values_ + key : nullptr, p_.value_dim);
      });
    }

    // Keys that every row may attend to lie side by side; those before and after them are looked at one by one.
    Span common{std::clamp(tile.common_first_key - span.first, int64_t{0}, count),
                std::clamp(tile.common_end_key - span.first, int64_t{0}, count)};
    if (common.is_empty()) common = {count, count};
    const auto for_others = [&](const auto& apply) {
      for (int64_t i = 0; i < common.first; ++i) apply(i);
      for (int64_t i = common.end; i < count; ++i) apply(i);
    };
    const SoftmaxRows state = state_of(states, head);
    for (int64_t row = 0; row < tile.rows; ++row) {
      float* const score = scores_ + row * kCacheSpan;
      if (rule_.is_prepared) rule_.prepare(score, {0, lanes});
      const CacheQuery& rules = query_of(tile, row);
      for_others([&](int64_t i) {
        if (!may_attend(rules, span.first + i, tile.first_draft_key)) score[i] = -kInfinity;
      });
      std::fill(score + count, score + lanes, -kInfinity);
      state.add(rule_, row, {0, lanes}, lanes, score, weights(row));
    }

    for_row_groups(tile.rows, [&]<int kRows>(int64_t row) {
      add_values<kRows>(weights(row), kCacheSpan, values_, common, p_.value_dim, state.out_of(row), columns_,
                        next_keys_);
    });
    for_others([&](int64_t i) {
      for (int64_t row = 0; row < tile.rows; ++row) {
        if (!may_attend(query_of(tile, row), span.first + i, tile.first_draft_key)) continue;
        add_value(static_cast<float>(weights(row)[i]), values_[i], p_.value_dim, state.out_of(row));
      }
    });
  }

  E* weights(int64_t row) const {
    if constexpr (kIsInPlace) {
      return scores_ + row * kCacheSpan;
    } else {
      return weights_ + row * kCacheSpan;
    }
  }

  void merge(const CacheTile& tile, int64_t head_task) {
    float* const first = p_.parts + (tile.first_task + head_task) * part_floats(p_);
    for (int64_t head = heads_.first; head < heads_.end; ++head) {
      const SoftmaxRows state = state_of(states_, head), first_part = state_of(first, head);
      for (int64_t row = 0; row < tile.rows; ++row) {
        state.merge(rule_, row, first_part, p_.head_tasks() * part_floats(p_), tile.chunks);
      }
    }
    finish(tile, states_);
  }

  void finish(const CacheTile& tile, float* states) {
    for (int64_t head = heads_.first; head < heads_.end; ++head) {
      const SoftmaxRows state = state_of(states, head);
      for (int64_t row = 0; row < tile.rows; ++row) {
        const CacheQuery& query = query_of(tile, row);
        const int64_t q_head = query_head(tile, row, head);
        float& lse = p_.lse[(query.batch * p_.query_heads + q_head) * p_.query_length + query.token];
        state.finish(rule_, row, p_.sinks ? p_.sinks + q_head : nullptr, p_.out.at<T>(query.batch, query.token, q_head),
                     p_.value_dim, lse);
      }
    }
  }

  const KvCacheKernelProblem& p_;
  const int64_t depth_, columns_;
  const LogitRule rule_;
  Workspace space_;
  Span heads_;
  E *query_, *weights_;
  float *scores_, *states_;
  const T *keys_[kCacheSpan], *values_[kCacheSpan], *next_keys_[kCacheSpan];  // the rows of a span and head
};

template <typename T, typename E>
constexpr KvCacheKernels make_kernels() {
  using Attention = KvCacheAttention<T, E>;
  return {Attention::part_floats, [](const KvCacheKernelProblem& p) { return Attention(p, nullptr).workspace_bytes(); },
          [](const KvCacheKernelProblem& p, int64_t task, void* space) { Attention(p, space).attend(task); }};
}

extern const ByDtype<KvCacheKernels> kKvCacheKernels;
#if defined(__AVX512BF16__)
const ByDtype<KvCacheKernels> kKvCacheKernels{.of_bfloat16 = make_kernels<c10::BFloat16, c10::BFloat16>()};
#else
const ByDtype<KvCacheKernels> kKvCacheKernels{make_kernels<float, float>(), make_kernels<c10::BFloat16, float>(),
                                              make_kernels<c10::Half, float>()};
#endif

}  // namespace CPU_CAPABILITY
}  // namespace selfattn::cpu
