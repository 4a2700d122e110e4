// Promise: in a process without Python, every backend that can serve computes what the loops compute.
#include <gtest/gtest.h>

#include "reference.h"

namespace {

class AttentionMatchesLoops : public testing::TestWithParam<const char*> {};

TEST_P(AttentionMatchesLoops, OnPackedRowsWithGroupedHeads) {
  const auto q = torch::randn({2, 21, 4, 16}), k = torch::randn({2, 21, 2, 16}), v = torch::randn({2, 21, 2, 16});
  const auto ids = random_ids(2, 21);
  for (const bool causal : {true, false}) {
    const auto options = selfattn::AttentionOptions().segment_ids(ids).causal(causal).backend(GetParam());
    const auto out = selfattn::multihead_attention(q, k, v, options);
    EXPECT_LT((out - loop_attention(q, k, v, ids, causal)).abs().max().item<double>(), 1e-5);
  }
}

TEST_P(AttentionMatchesLoops, OnCrossLengthsCausal) {
  const auto q = torch::randn({1, 5, 2, 8}), k = torch::randn({1, 12, 2, 8}), v = torch::randn({1, 12, 2, 8});
  const auto out = selfattn::multihead_attention(q, k, v, selfattn::AttentionOptions().backend(GetParam()));
  EXPECT_LT((out - loop_attention(q, k, v, {}, true)).abs().max().item<double>(), 1e-5);
}

INSTANTIATE_TEST_SUITE_P(Backends, AttentionMatchesLoops, testing::Values("auto", "aten", "reference"));

}  // namespace
