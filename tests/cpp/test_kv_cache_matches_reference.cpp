// Promise: the CPU kernels over a KV cache give the outputs of the formula in float64, and an append writes what it is
// given, in every dtype.
#include <gtest/gtest.h>
#include <selfattn/ops.h>
#include <torch/torch.h>

#include "reference.h"

namespace {

constexpr int64_t kRows = 3, kPageSize = 16, kPagesOfARow = 20;

/// A cache of mixed lengths whose pages lie in any order.
struct Cache {
  torch::Tensor keys, values, lengths, page_table;

  Cache(int64_t heads, int64_t head_dim, int64_t value_dim, torch::ScalarType dtype)
      : keys(torch::randn({kRows * kPagesOfARow, kPageSize, heads, head_dim}).to(dtype)),
        values(torch::randn({kRows * kPagesOfARow, kPageSize, heads, value_dim}).to(dtype)),
        lengths(torch::tensor({kPageSize * kPagesOfARow, int64_t{70}, int64_t{301}}, torch::kInt)),
        page_table(torch::randperm(kRows * kPagesOfARow).to(torch::kInt).view({kRows, kPagesOfARow})) {}
};

class KVCacheMatchesReference : public testing::TestWithParam<std::tuple<torch::ScalarType, double>> {
 protected:
  static void compare(const Cache& cache, const torch::Tensor& query, selfattn::KVCacheAttentionOptions options) {
    options.page_table(cache.page_table);
    const auto [out, lse] =
        selfattn::attention_with_kv_cache_lse(query, cache.keys, cache.values, cache.lengths, options.backend("flash"));
    const auto [expected_out, expected_lse] = selfattn::attention_with_kv_cache_lse(
        query.to(torch::kDouble), cache.keys.to(torch::kDouble), cache.values.to(torch::kDouble), cache.lengths,
        options.backend("reference"));
    EXPECT_LT(relative_error(out, expected_out), std::get<double>(GetParam()));
    EXPECT_LT(relative_error(lse, expected_lse), 2e-6);
  }

  /// Heads in groups of `group`, one token a row or several.
  static void compare_shapes(const selfattn::KVCacheAttentionOptions& options, int64_t head_dim, int64_t value_dim) {
    const auto dtype = std::get<torch::ScalarType>(GetParam());
    for (const int64_t group : {1, 3, 8}) {
      const Cache cache(2, head_dim, value_dim, dtype);
      for (const int64_t queries : {1, 5, 40}) {
        compare(cache, torch::randn({kRows, queries, 2 * group, head_dim}).to(dtype), options);
      }
    }
  }
};

TEST_P(KVCacheMatchesReference, InHeadsOfAnySize) {
  compare_shapes({}, 64, 64);
  compare_shapes({}, 128, 128);
  compare_shapes({}, 41, 37);
}

TEST_P(KVCacheMatchesReference, InAWindow) {
  compare_shapes(selfattn::KVCacheAttentionOptions().window_left(30), 32, 32);
  compare_shapes(selfattn::KVCacheAttentionOptions().causal(false).window_left(90).window_right(2), 32, 32);
}

TEST_P(KVCacheMatchesReference, InParts) { compare_shapes(selfattn::KVCacheAttentionOptions().split_keys(64), 32, 48); }

TEST_P(KVCacheMatchesReference, WithSoftcapAndSinks) {
  const auto options = selfattn::KVCacheAttentionOptions().softcap(2.0);
  const auto dtype = std::get<torch::ScalarType>(GetParam());
  const Cache cache(2, 32, 32, dtype);
  for (const int64_t queries : {1, 6, 40}) {
    compare(cache, torch::randn({kRows, queries, 4, 32}).to(dtype),
            selfattn::KVCacheAttentionOptions(options).sinks(torch::randn({4})));
  }
}

TEST_P(KVCacheMatchesReference, AfterAnAppendOfHeadsThatItNormalisesAndRotates) {
  const auto dtype = std::get<torch::ScalarType>(GetParam());
  const Cache cache(2, 64, 64, dtype);
  const auto q = torch::randn({kRows, 3, 4, 64}).to(dtype), k = torch::randn({kRows, 3, 2, 64}).to(dtype);
  const auto v = torch::randn({kRows, 3, 2, 64}).to(dtype), weight = torch::rand({64}) + 0.5;
  const auto slots = selfattn::kv_cache_positions(cache.lengths, {}, 3, kPageSize * kPagesOfARow);
  const auto options = selfattn::QkNormRopeOptions().q_weight(weight).k_weight(weight);
  const auto turned_q =
      selfattn::qk_norm_rope_append(q, k, v, slots, cache.keys, cache.values, options, cache.page_table);
  const auto [expected_q, expected_k] = selfattn::qk_norm_rope(q.to(torch::kDouble), k.to(torch::kDouble),
                                                               selfattn::QkNormRopeOptions(options).positions(slots));
  EXPECT_LT(relative_error(turned_q, expected_q), std::get<double>(GetParam()));
  const auto pages = cache.page_table.gather(1, slots.div(kPageSize, "floor")).to(torch::kLong);
  EXPECT_LT(relative_error(cache.keys.index({pages, slots % kPageSize}), expected_k), std::get<double>(GetParam()));
  EXPECT_TRUE(cache.values.index({pages, slots % kPageSize}).equal(v));
  compare(cache, turned_q, {});
}

INSTANTIATE_TEST_SUITE_P(Dtypes, KVCacheMatchesReference,
                         testing::Values(std::make_tuple(torch::kFloat32, 2e-6),
                                         std::make_tuple(torch::kBFloat16, 4e-3),
                                         std::make_tuple(torch::kFloat16, 6e-4)));

}  // namespace
