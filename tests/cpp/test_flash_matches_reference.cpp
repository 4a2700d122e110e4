// Promise: the CPU kernels give the outputs and gradients of the formula in float64, under every option.
#include <gtest/gtest.h>
#include <selfattn/ops.h>
#include <torch/torch.h>

#include "reference.h"

namespace {

struct Shape {
  int64_t batch, query_length, key_length, heads, key_heads, head_dim, value_dim;
};

struct Gradients {
  torch::Tensor out, lse, query, key, value, sinks;
};

struct Inputs {
  torch::Tensor query, key, value, sinks, grad_out, grad_lse;

  Inputs(const Shape& s, torch::ScalarType dtype)
      : query(torch::randn({s.batch, s.query_length, s.heads, s.head_dim}).to(dtype)),
        key(torch::randn({s.batch, s.key_length, s.key_heads, s.head_dim}).to(dtype)),
        value(torch::randn({s.batch, s.key_length, s.key_heads, s.value_dim}).to(dtype)),
        sinks(torch::randn({s.heads})),
        grad_out(torch::randn({s.batch, s.query_length, s.heads, s.value_dim}).to(dtype)),
        grad_lse(torch::randn({s.batch, s.heads, s.query_length})) {}

  Gradients run(selfattn::AttentionOptions options, const char* backend, torch::ScalarType dtype) const {
    const auto leaf = [&](const torch::Tensor& tensor) { return tensor.detach().to(dtype).requires_grad_(); };
    const torch::Tensor q = leaf(query), k = leaf(key), v = leaf(value), sink = sinks.detach().requires_grad_();
    if (options.sinks()) options.sinks(sink);
    const auto [out, lse] = selfattn::multihead_attention_lse(q, k, v, options.backend(backend));
    const torch::Tensor is_finite = lse.isfinite();
    const torch::Tensor loss = (out * grad_out.to(dtype)).sum(torch::kFloat64) +
                               (lse.masked_fill(is_finite.logical_not(), 0.0) * grad_lse).sum(torch::kFloat64);
    loss.backward();
    return {out.detach(), lse.detach(), q.grad(), k.grad(), v.grad(), sink.grad()};
  }
};

class FlashMatchesReference : public testing::TestWithParam<std::tuple<torch::ScalarType, double>> {
 protected:
  /// A query with one key has no gradient through its softmax: of dq and dk the difference of two rounded sums remains
  /// beside the part of lse, which may be small. `slack` allows for it.
  static void compare(const Shape& shape, const selfattn::AttentionOptions& options, double slack = 1.0) {
    const auto [dtype, tolerance] = GetParam();
    const Inputs inputs(shape, dtype);
    const Gradients actual = inputs.run(options, "flash", dtype);
    const Gradients expected = inputs.run(options, "reference", torch::kDouble);
    EXPECT_LT(relative_error(actual.out, expected.out), tolerance);
    EXPECT_TRUE(torch::allclose(actual.lse, expected.lse, 0.0, 2e-2 * tolerance / 4e-3 + 1e-5));
    EXPECT_LT(relative_error(actual.query, expected.query), slack * 2 * tolerance);
    EXPECT_LT(relative_error(actual.key, expected.key), slack * 2 * tolerance);
    EXPECT_LT(relative_error(actual.value, expected.value), 2 * tolerance);
    if (options.sinks()) EXPECT_LT(relative_error(actual.sinks, expected.sinks), 8 * tolerance);
  }
};

TEST_P(FlashMatchesReference, OnDenseRowsOfOddLengths) {
  for (const int64_t length : {1, 63, 130}) {
    for (const bool causal : {true, false}) {
      compare({2, length, length, 2, 2, 40, 40}, selfattn::AttentionOptions().causal(causal), length == 1 ? 10.0 : 1.0);
    }
  }
}

TEST_P(FlashMatchesReference, OnDocumentsWithGroupedHeads) {
  const auto documents = torch::arange(200, torch::kInt32).div(37, "floor").to(torch::kInt32).repeat({2, 1});
  compare({2, 200, 200, 6, 2, 64, 64}, selfattn::AttentionOptions().segment_ids(documents));
}

TEST_P(FlashMatchesReference, OnIdsOfAnyOrder) {
  for (const bool causal : {true, false}) {
    compare({2, 150, 150, 2, 1, 24, 24}, selfattn::AttentionOptions().segment_ids(random_ids(2, 150)).causal(causal));
  }
}

TEST_P(FlashMatchesReference, OnPositionsInOrderAndInAnyOrder) {
  const auto keys = torch::arange(140, torch::kInt32).repeat({2, 1});
  const auto queries = keys.slice(1, 60, 110);
  for (const auto& order : {torch::arange(140), torch::randperm(140)}) {
    const auto options = selfattn::AttentionOptions().positions(queries).kv_positions(keys.index_select(1, order));
    compare({2, 50, 140, 4, 2, 32, 32}, options);
    compare({2, 50, 140, 4, 2, 32, 32}, selfattn::AttentionOptions(options).window_left(30));
  }
  compare({2, 140, 140, 2, 2, 32, 32}, selfattn::AttentionOptions().positions(keys.flip({1})), 10.0);
}

TEST_P(FlashMatchesReference, WithWindowSoftcapAndSinks) {
  const auto options = selfattn::AttentionOptions().window_left(20).softcap(4.0).sinks(torch::zeros({4}));
  compare({1, 90, 90, 4, 2, 32, 32}, options);
}

TEST_P(FlashMatchesReference, OnCrossLengthsAndOwnKeyIds) {
  const auto options = selfattn::AttentionOptions().segment_ids(random_ids(2, 33)).kv_segment_ids(random_ids(2, 140));
  compare({2, 33, 140, 2, 2, 16, 48}, options);
  compare({1, 4, 700, 8, 2, 64, 64}, selfattn::AttentionOptions());
}

INSTANTIATE_TEST_SUITE_P(Dtypes, FlashMatchesReference,
                         testing::Values(std::make_tuple(torch::kFloat32, 2e-6),
                                         std::make_tuple(torch::kBFloat16, 4e-3),
                                         std::make_tuple(torch::kFloat16, 6e-4)));

}  // namespace
