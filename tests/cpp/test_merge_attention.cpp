// Promise: merge_attention joins results over disjoint keys into the result over all of them, in C++ too.
#include <gtest/gtest.h>
#include <selfattn/ops.h>
#include <torch/torch.h>

#include <limits>

#include "reference.h"

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

TEST(MergeAttention, GivesTheWholeOfTwoParts) {
  const auto options = torch::dtype(torch::kDouble).requires_grad(true);
  const auto q = torch::randn({2, 12, 4, 8}, options), k = torch::randn({2, 12, 2, 8}, options),
             v = torch::randn({2, 12, 2, 8}, options);
  const auto ids = random_ids(2, 12);
  const auto part = [&](int64_t first, int64_t end) {
    return selfattn::multihead_attention_lse(
        q, k.slice(1, first, end), v.slice(1, first, end),
        selfattn::AttentionOptions().segment_ids(ids).kv_segment_ids(ids.slice(1, first, end)).causal(false));
  };
  const auto [left, left_lse] = part(0, 5);
  const auto [right, right_lse] = part(5, 12);
  const auto [out, lse] = selfattn::merge_attention(left, left_lse, right, right_lse);
  EXPECT_TRUE(torch::allclose(out, loop_attention(q, k, v, ids, /*causal=*/false), 1e-6, 1e-6));

  const auto whole = selfattn::multihead_attention(
      q, k, v, selfattn::AttentionOptions().segment_ids(ids).causal(false).backend("reference"));
  const auto actual = torch::autograd::grad({out.square().sum()}, {q, k, v});
  const auto expected = torch::autograd::grad({whole.square().sum()}, {q, k, v});
  for (size_t i = 0; i < actual.size(); ++i) EXPECT_TRUE(torch::allclose(actual[i], expected[i], 1e-5, 1e-6));
}

TEST(MergeAttention, LeavesRowsWithoutKeysEmpty) {
  const auto out = torch::zeros({1, 3, 2, 4}, torch::requires_grad());
  const auto lse = torch::full({1, 2, 3}, -kInfinity, torch::requires_grad());
  const auto [merged, merged_lse] = selfattn::merge_attention(out, lse, out, lse);
  EXPECT_TRUE(merged.eq(0).all().item<bool>());
  EXPECT_TRUE(merged_lse.eq(-kInfinity).all().item<bool>());
  for (const auto& gradient : torch::autograd::grad({merged.sum() + merged_lse.sum()}, {out, lse})) {
    EXPECT_TRUE(gradient.isfinite().all().item<bool>());
  }
}

TEST(MergeAttention, NamesABadArgument) {
  const auto out = torch::zeros({1, 3, 2, 4}), lse = torch::zeros({1, 2, 3});
  EXPECT_THROW(selfattn::merge_attention(out, lse.transpose(1, 2), out, lse), c10::ValueError);
  EXPECT_THROW(selfattn::merge_attention(out, lse, out.to(torch::kDouble), lse), c10::TypeError);
}

}  // namespace
