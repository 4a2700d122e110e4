// Promise: the CPU kernels of qk_norm_rope give the values and gradients of the formula in float64, in every dtype.
#include <gtest/gtest.h>
#include <selfattn/ops.h>
#include <torch/torch.h>

#include "reference.h"

namespace {

class QkNormRopeMatchesReference : public testing::TestWithParam<std::tuple<torch::ScalarType, double>> {
 protected:
  /// q, k and the gradients of both and of the norms' weights.
  static std::vector<torch::Tensor> run(const std::vector<torch::Tensor>& inputs, selfattn::QkNormRopeOptions options,
                                        torch::ScalarType dtype) {
    std::vector<torch::Tensor> leaves;
    for (const auto& input : inputs) leaves.push_back(input.detach().to(dtype).requires_grad_());
    if (options.norm()) options.q_weight(leaves[2]).k_weight(leaves[3]);
    const auto [q, k] = selfattn::qk_norm_rope(leaves[0], leaves[1], options);
    (q.to(torch::kDouble).sin().sum() + k.to(torch::kDouble).cos().sum()).backward();
    std::vector<torch::Tensor> results = {q.detach(), k.detach(), leaves[0].grad(), leaves[1].grad()};
    if (options.norm()) results.insert(results.end(), {leaves[2].grad(), leaves[3].grad()});
    return results;
  }

  static void compare(int64_t head_dim, const selfattn::QkNormRopeOptions& options) {
    const auto [dtype, tolerance] = GetParam();
    const std::vector<torch::Tensor> inputs = {
        torch::randn({2, 19, 6, head_dim}).to(dtype), torch::randn({2, 19, 2, head_dim}).to(dtype),
        torch::rand({head_dim}).add(0.5).to(dtype), torch::rand({head_dim}).add(0.5).to(dtype)};
    const auto actual = run(inputs, options, dtype), expected = run(inputs, options, torch::kDouble);
    for (size_t i = 0; i < expected.size(); ++i) EXPECT_LT(relative_error(actual[i], expected[i]), 2 * tolerance) << i;
  }
};

TEST_P(QkNormRopeMatchesReference, InHeadsOfAnySizeAndEitherPairing) {
  for (const int64_t head_dim : {24, 64, 128}) {
    for (const char* pairing : {"interleaved", "half"}) {
      compare(head_dim, selfattn::QkNormRopeOptions().pairing(pairing));
      compare(head_dim, selfattn::QkNormRopeOptions().pairing(pairing).norm(false));
    }
    compare(head_dim, selfattn::QkNormRopeOptions().rope(false));
  }
}

TEST_P(QkNormRopeMatchesReference, AtPositionsAndWithTablesThatAreGiven) {
  const auto positions = torch::randint(0, 5000, {2, 19});
  compare(64, selfattn::QkNormRopeOptions().positions(positions));
  const auto [sin, cos] = selfattn::precompute_freqs(32, selfattn::FreqsOptions().pos_idx(positions));
  compare(64, selfattn::QkNormRopeOptions().freqs_sin(sin).freqs_cos(cos));
}

INSTANTIATE_TEST_SUITE_P(Dtypes, QkNormRopeMatchesReference,
                         testing::Values(std::make_tuple(torch::kFloat32, 2e-6),
                                         std::make_tuple(torch::kBFloat16, 4e-3),
                                         std::make_tuple(torch::kFloat16, 6e-4)));

}  // namespace
