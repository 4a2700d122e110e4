// Promise: to_torchscript gives a module that, saved and loaded, computes the same outputs and gradients.
#include <gtest/gtest.h>
#include <selfattn/selfattn.h>
#include <torch/script.h>
#include <torch/torch.h>

#include <sstream>

namespace {

using selfattn::SelfAttention;
using selfattn::SelfAttentionOptions;

/// 0: the defaults; 1: every option; 2: norms of whole projections, too.
class TorchScript : public testing::TestWithParam<int> {};

TEST_P(TorchScript, EqualsTheModuleAfterSaveAndLoad) {
  const bool full = GetParam() > 0;
  auto options = SelfAttentionOptions(64).head_dim(16).num_kv_heads(2).qk_norm(full).use_bias(full).sinks(full);
  if (full) options.softcap(5.0).num_heads(6).qk_scale(0.3).out_bias(false).norm_unit_offset(true);
  if (GetParam() == 2) options.qk_norm_scope("projection");
  SelfAttention module(options);
  std::stringstream stream;
  selfattn::to_torchscript(module).save(stream);
  torch::jit::Module script = torch::jit::load(stream);

  const auto x = torch::randn({2, 11, 64}), weight = torch::randn({2, 11, 64});
  const auto ids = torch::randint(-1, 3, {2, 11}, torch::kInt32);
  const auto [sin, cos] = selfattn::precompute_freqs(16, selfattn::FreqsOptions().max_length(11));
  const auto expected = module->forward(x, sin, cos, ids);
  const auto actual = script.forward({x, std::make_tuple(sin, cos), ids}).toTensor();
  EXPECT_TRUE(torch::equal(expected, actual)) << GetParam();

  (expected * weight).sum().backward();
  (actual * weight).sum().backward();
  const auto parameters = module->named_parameters();
  size_t compared = 0;
  for (const auto& parameter : script.named_parameters()) {
    EXPECT_TRUE(torch::equal(parameters[parameter.name].grad(), parameter.value.grad())) << parameter.name;
    ++compared;
  }
  EXPECT_EQ(compared, parameters.size());
}

TEST(TorchScript, TakesXAlone) {
  SelfAttention module(SelfAttentionOptions(64));
  auto script = selfattn::to_torchscript(module);
  const auto x = torch::randn({1, 6, 64});
  EXPECT_TRUE(torch::equal(module->forward(x), script.forward({x}).toTensor()));
}

TEST(TorchScript, RotatesAsTheLayerDoes) {
  const auto longrope = selfattn::RopeParameters(4)
                            .rope_type("longrope")
                            .original_max_position_embeddings(8)
                            .factor(4.0)
                            .short_factor(std::vector<double>{1.0, 1.5})
                            .long_factor(std::vector<double>{2.0, 3.0});
  for (const bool is_scaled : {false, true}) {
    auto options = SelfAttentionOptions(64).head_dim(16);
    SelfAttention module(is_scaled ? options.rope_scaling(longrope) : options.rotary_dim(4));
    std::stringstream stream;
    selfattn::to_torchscript(module).save(stream);
    auto script = torch::jit::load(stream);
    for (const int64_t length : {5, 13}) {
      const auto x = torch::randn({2, length, 64});
      EXPECT_TRUE(torch::equal(module->forward(x), script.forward({x}).toTensor())) << length;
    }
  }
}

TEST(TorchScript, FollowsTrainAndEval) {
  SelfAttention module(SelfAttentionOptions(64).dropout_rate(0.5));
  auto script = selfattn::to_torchscript(module);
  const auto x = torch::randn({1, 6, 64});
  script.eval();
  EXPECT_EQ((script.forward({x}).toTensor() == 0).sum().item<int64_t>(), 0);
  script.train();
  EXPECT_GT((script.forward({x}).toTensor() == 0).sum().item<int64_t>(), 0);
}

INSTANTIATE_TEST_SUITE_P(Options, TorchScript, testing::Range(0, 3));

}  // namespace
