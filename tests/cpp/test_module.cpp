// Promise: SelfAttention behaves as a LibTorch module: registered names, initialisation, reset, clone, save and load.
#include <gtest/gtest.h>
#include <selfattn/selfattn.h>
#include <torch/script.h>
#include <torch/torch.h>

#include <filesystem>
#include <sstream>

namespace {

using selfattn::SelfAttention;
using selfattn::SelfAttentionOptions;

SelfAttentionOptions every_option() {
  return SelfAttentionOptions(64).head_dim(16).num_kv_heads(2).qk_norm(true).use_bias(true).sinks(true);
}

TEST(Module, RegistersTheNamesOfThePythonModule) {
  std::vector<std::string> names = SelfAttention(every_option())->named_parameters().keys();
  std::sort(names.begin(), names.end());
  const std::vector<std::string> expected = {"k_norm.weight",   "k_proj.bias",   "k_proj.weight", "out_proj.bias",
                                             "out_proj.weight", "q_norm.weight", "q_proj.bias",   "q_proj.weight",
                                             "sinks",           "v_proj.bias",   "v_proj.weight"};
  EXPECT_EQ(names, expected);
  EXPECT_EQ(SelfAttention(SelfAttentionOptions(64))->parameters().size(), 4u);
}

TEST(Module, RunsTheReadme) {
  std::filesystem::current_path(testing::TempDir());
  const auto x = torch::randn({1, 8, 256}), segment_ids = torch::tensor({{0, 0, 0, 1, 1, 1, 1, -1}});
  torch::nn::Identity adapter;
  selfattn::SelfAttention layer(selfattn::SelfAttentionOptions(256).head_dim(64).qk_norm(true));
  torch::Tensor y = layer->forward(x, /*freqs_sin=*/{}, /*freqs_cos=*/{}, segment_ids);
  selfattn::to_torchscript(layer).save("layer.pt");         // loads wherever LibTorch and libselfattn.so are
  layer->replace("q_proj", torch::nn::AnyModule(adapter));  // from then on called in its place
  EXPECT_TRUE(torch::equal(y, torch::jit::load("layer.pt").forward({x, torch::IValue(), segment_ids}).toTensor()));
  EXPECT_FALSE(torch::allclose(y, layer->forward(x, {}, {}, segment_ids)));
}

TEST(Module, HasTheHeadsAndBiasesThatAreGiven) {
  SelfAttention module(SelfAttentionOptions(20).head_dim(8).num_heads(6).num_kv_heads(2).qkv_bias(true));
  EXPECT_EQ(module->q_proj->weight.sizes(), (std::vector<int64_t>{48, 20}));
  EXPECT_EQ(module->k_proj->weight.sizes(), (std::vector<int64_t>{16, 20}));
  EXPECT_EQ(module->out_proj->weight.sizes(), (std::vector<int64_t>{20, 48}));
  EXPECT_TRUE(module->v_proj->bias.defined());
  EXPECT_FALSE(module->out_proj->bias.defined());
  EXPECT_EQ(module->forward(torch::randn({2, 5, 20})).sizes(), (std::vector<int64_t>{2, 5, 20}));
  EXPECT_THROW(SelfAttention(SelfAttentionOptions(20).num_heads(0)), c10::ValueError);
  EXPECT_THROW(SelfAttention(SelfAttentionOptions(20).num_heads(4).num_kv_heads(3)), c10::ValueError);
  EXPECT_THROW(SelfAttention(SelfAttentionOptions(64).qk_scale(std::nan(""))), c10::ValueError);
}

TEST(Module, NormsMayBeHeldAsTheirDistanceFromOne) {
  SelfAttention own(every_option()), around_one(every_option().norm_unit_offset(true));
  EXPECT_EQ(around_one->q_norm->weight.abs().max().item<double>(), 0.0);
  EXPECT_EQ(own->q_norm->weight.min().item<double>(), 1.0);
  {
    const torch::NoGradGuard no_grad;
    for (const auto& parameter : own->named_parameters()) {
      const bool is_norm = parameter.key().find("norm") != std::string::npos;
      if (is_norm) parameter->add_(0.3 * torch::randn_like(*parameter));
      around_one->named_parameters()[parameter.key()].copy_(is_norm ? *parameter - 1.0 : *parameter);
    }
  }
  const auto x = torch::randn({2, 7, 64});
  EXPECT_TRUE(torch::allclose(own->forward(x), around_one->forward(x), 1e-4, 1e-5));
  around_one->replace("k_norm", torch::nn::AnyModule(torch::nn::Identity()));  // q's is called now
  own->replace("k_norm", torch::nn::AnyModule(torch::nn::Identity()));
  EXPECT_TRUE(torch::allclose(own->forward(x), around_one->forward(x), 1e-4, 1e-5));
  EXPECT_THROW(SelfAttention(SelfAttentionOptions(64).norm_unit_offset(true)), c10::ValueError);
}

TEST(Module, NormalisesWholeProjections) {
  SelfAttention module(every_option().qk_norm_scope("projection")), plain(every_option().qk_norm(false));
  EXPECT_EQ(module->q_norm->weight.numel(), 64);
  EXPECT_EQ(module->k_norm->weight.numel(), 32);
  {
    const torch::NoGradGuard no_grad;
    for (const auto& parameter : module->named_parameters()) parameter->add_(0.1 * torch::randn_like(*parameter));
    for (const auto& parameter : plain->named_parameters())
      parameter->copy_(module->named_parameters()[parameter.key()]);
  }
  struct NormalisedImpl : torch::nn::Module {
    NormalisedImpl(torch::nn::Linear projection_, torch::Tensor weight_)
        : projection(register_module("projection", std::move(projection_))), weight(std::move(weight_)) {}
    torch::Tensor forward(const torch::Tensor& x) {
      const auto y = projection(x);
      return y * (y.square().mean(-1, true) + 1e-6).rsqrt() * weight;
    }
    torch::nn::Linear projection;
    torch::Tensor weight;
  };
  plain->replace("q_proj",
                 torch::nn::AnyModule(std::make_shared<NormalisedImpl>(plain->q_proj, module->q_norm->weight)));
  plain->replace("k_proj",
                 torch::nn::AnyModule(std::make_shared<NormalisedImpl>(plain->k_proj, module->k_norm->weight)));
  const auto x = torch::randn({2, 7, 64});
  EXPECT_TRUE(torch::allclose(module->forward(x), plain->forward(x), 1e-4, 1e-5));
  EXPECT_THROW(SelfAttention(SelfAttentionOptions(64).qk_norm_scope("projection")), c10::ValueError);
}

TEST(Module, MayLeavePositionsOut) {
  SelfAttention module(SelfAttentionOptions(64).head_dim(16).rope(false).causal(false));
  const auto x = torch::randn({1, 6, 64}), order = torch::tensor({3, 1, 5, 0, 2, 4});
  const auto moved = module->forward(x.index_select(1, order));
  EXPECT_TRUE(torch::allclose(moved, module->forward(x).index_select(1, order), 1e-4, 1e-6));
  EXPECT_TRUE(torch::equal(selfattn::to_torchscript(module).forward({x}).toTensor(), module->forward(x)));
  module->replace("v_proj", torch::nn::AnyModule(torch::nn::Identity()));
  EXPECT_TRUE(torch::allclose(module->forward(x.index_select(1, order)), module->forward(x).index_select(1, order),
                              1e-4, 1e-6));
}

TEST(Module, RotatesAsItsOptionsSay) {
  const auto scaling = selfattn::RopeParameters(8).rope_type("yarn").factor(4.0).original_max_position_embeddings(8);
  SelfAttention layer(SelfAttentionOptions(64).head_dim(16).rope_scaling(scaling));
  const auto x = torch::randn({2, 9, 64});
  const auto [sin, cos] = selfattn::rope_tables(scaling, selfattn::RopeTablesOptions().max_length(9));
  EXPECT_TRUE(torch::equal(layer->forward(x), layer->forward(x, sin, cos)));
  const auto power = sin.square() + cos.square();  // the attention factor's
  EXPECT_TRUE(torch::allclose(power, torch::full_like(power, 1.138629436111989 * 1.138629436111989)));

  SelfAttention partial(SelfAttentionOptions(64).head_dim(16).rotary_dim(4).rope_theta(300.0));
  const auto [part_sin, part_cos] = selfattn::precompute_freqs(4, selfattn::FreqsOptions().max_length(9).theta(300.0));
  EXPECT_TRUE(torch::equal(partial->forward(x), partial->forward(x, part_sin, part_cos)));
}

TEST(Module, RefusesRotationsThatContradict) {
  const auto yarn = selfattn::RopeParameters(8).rope_type("yarn").factor(4.0).original_max_position_embeddings(8);
  const auto base = SelfAttentionOptions(64).head_dim(16);
  for (const auto& options : {
           SelfAttentionOptions(base).rotary_dim(7),
           SelfAttentionOptions(base).rotary_dim(18),
           SelfAttentionOptions(base).rotary_dim(8).rope(false),
           SelfAttentionOptions(base).rope_length(9),
           SelfAttentionOptions(base).rope_scaling(yarn).rotary_dim(16),
           SelfAttentionOptions(base).rope_scaling(yarn).rope_theta(7.0),
           SelfAttentionOptions(base).rope_scaling(yarn).rope_length(9),
           SelfAttentionOptions(base).rope_scaling(selfattn::RopeParameters(8).rope_type("linear")),
           SelfAttentionOptions(base).rope_scaling(selfattn::RopeParameters(8).rope_type("ntk")),
           SelfAttentionOptions(base).rope_scaling(selfattn::RopeParameters(32)),
       }) {
    EXPECT_THROW(SelfAttention{options}, c10::ValueError);
  }
}

TEST(Module, ScalesTheLogitsByWhatIsGiven) {
  SelfAttention own(SelfAttentionOptions(64).head_dim(16)), given(SelfAttentionOptions(64).head_dim(16).qk_scale(0.25));
  SelfAttention other(SelfAttentionOptions(64).head_dim(16).qk_scale(0.7));
  for (auto* module : {&given, &other}) {
    const torch::NoGradGuard no_grad;
    for (const auto& parameter : own->named_parameters())
      (*module)->named_parameters()[parameter.key()].copy_(*parameter);
  }
  const auto x = torch::randn({2, 7, 64});
  EXPECT_TRUE(torch::allclose(own->forward(x), given->forward(x)));
  EXPECT_FALSE(torch::allclose(own->forward(x), other->forward(x), 1e-4, 1e-6));
}

TEST(Module, InitialisesByTheStatedDeviations) {
  const SelfAttention module(SelfAttentionOptions(1024).num_layers(6).use_bias(true));
  const double in_std = std::sqrt(2.0 / (5.0 * 1024)), out_std = 2.0 / 12 / std::sqrt(1024.0);
  for (const auto& projection : {module->q_proj, module->k_proj, module->v_proj}) {
    EXPECT_NEAR(projection->weight.std().item<double>() / in_std, 1.0, 0.01);
  }
  EXPECT_NEAR(module->out_proj->weight.std().item<double>() / out_std, 1.0, 0.01);
  EXPECT_EQ(module->q_proj->bias.abs().max().item<double>(), 0.0);
}

TEST(Module, CanBeResetAgain) {
  SelfAttention module(every_option());
  const auto before = module->q_proj->weight.clone();
  module->reset();
  EXPECT_EQ(module->parameters().size(), 11u);
  EXPECT_FALSE(torch::equal(before, module->q_proj->weight));
}

TEST(Module, ClonesIntoParametersOfItsOwn) {
  SelfAttention module(every_option());
  const auto copy = std::dynamic_pointer_cast<selfattn::SelfAttentionImpl>(module->clone());
  const auto x = torch::randn({2, 9, 64});
  EXPECT_TRUE(torch::equal(module->forward(x), copy->forward(x)));
  copy->q_proj->weight.data().zero_();
  EXPECT_FALSE(torch::equal(module->q_proj->weight, copy->q_proj->weight));
}

TEST(Module, SavesAndLoads) {
  SelfAttention module(every_option()), other(every_option());
  std::stringstream stream;
  torch::save(module, stream);
  torch::load(other, stream);
  const auto x = torch::randn({1, 7, 64});
  EXPECT_TRUE(torch::equal(module->forward(x), other->forward(x)));
}

TEST(Module, DropsOutOnlyInTraining) {
  SelfAttention module(SelfAttentionOptions(64).dropout_rate(0.5));
  const auto x = torch::randn({4, 32, 64});
  module->train();
  const double zeros = (module->forward(x) == 0).to(torch::kDouble).mean().item<double>();
  EXPECT_NEAR(zeros, 0.5, 0.05);
  module->eval();
  EXPECT_EQ((module->forward(x) == 0).sum().item<int64_t>(), 0);
}

TEST(Module, KeepsDocumentsApart) {
  SelfAttention module(every_option());
  auto x = torch::randn({1, 8, 64});
  const auto ids = torch::tensor({{0, 0, 0, 1, 1, 1, 1, -1}}, torch::kInt32);
  const auto before = module->forward(x, {}, {}, ids);
  x = x.clone();
  x.narrow(1, 0, 3).normal_();
  const auto after = module->forward(x, {}, {}, ids);
  EXPECT_TRUE(torch::equal(before.narrow(1, 3, 5), after.narrow(1, 3, 5)));
  EXPECT_FALSE(torch::equal(before.narrow(1, 0, 3), after.narrow(1, 0, 3)));
}

TEST(Module, WorksInASequential) {
  torch::nn::Sequential layers(SelfAttention(SelfAttentionOptions(64)), torch::nn::Linear(64, 8));
  EXPECT_EQ(layers->forward(torch::randn({2, 5, 64})).sizes(), (std::vector<int64_t>{2, 5, 8}));
}

/// Beside a projection, as adapters are.
struct LowRankImpl : torch::nn::Module {
  explicit LowRankImpl(torch::nn::Linear base_)
      : base(register_module("base", std::move(base_))),
        down(register_module("down", torch::nn::Linear(torch::nn::LinearOptions(64, 2).bias(false)))),
        up(register_module("up",
                           torch::nn::Linear(torch::nn::LinearOptions(2, base->options.out_features()).bias(false)))) {}

  torch::Tensor forward(const torch::Tensor& x) { return base(x) + up(down(x)); }

  torch::nn::Linear base, down, up;
};
TORCH_MODULE(LowRank);

TEST(Module, CallsWhatReplacesAProjection) {
  for (const char* name : {"q_proj", "k_proj", "v_proj", "out_proj"}) {
    SelfAttention module(every_option()),
        merged =
            std::dynamic_pointer_cast<selfattn::SelfAttentionImpl>(std::shared_ptr<torch::nn::Module>(module->clone()));
    const auto own = [&](SelfAttention& of) -> torch::nn::Linear& {
      return *name == 'q' ? of->q_proj : *name == 'k' ? of->k_proj : *name == 'v' ? of->v_proj : of->out_proj;
    };
    LowRank adapter(own(module));
    module->replace(name, torch::nn::AnyModule(adapter));
    EXPECT_FALSE(module->is_plain());
    {
      const torch::NoGradGuard no_grad;
      own(merged)->weight += adapter->up->weight.mm(adapter->down->weight);
    }
    const auto x = torch::randn({2, 5, 64}), ids = torch::tensor({{0, 0, 1, 1, -1}, {3, 3, 3, 3, 3}});
    const auto out = module->forward(x, {}, {}, ids);
    EXPECT_TRUE(torch::allclose(out, merged->forward(x, {}, {}, ids), 1e-4, 1e-5)) << name;
    out.sum().backward();
    EXPECT_GT(adapter->up->weight.grad().abs().max().item<double>(), 0.0) << name;
    EXPECT_TRUE(module->named_parameters().contains(std::string(name) + ".base.weight"));
  }
}

TEST(Module, CallsWhatReplacesANorm) {
  SelfAttention module(every_option());
  const auto x = torch::randn({2, 5, 64});
  const auto before = module->forward(x);
  module->replace("q_norm", torch::nn::AnyModule(torch::nn::Identity()));
  const auto q = module->q_proj(x), k = module->k_proj(x).view({2, 5, 2, 16});
  const auto normalised = k * (k.square().mean(-1, true) + 1e-6).rsqrt() * module->k_norm->weight;
  EXPECT_FALSE(torch::allclose(module->forward(x), before));
  const auto expected = torch::linear(
      torch::Tensor(c10::Dispatcher::singleton()
                        .findSchemaOrThrow("selfattn::projected_attention", "")
                        .typed<torch::Tensor(const torch::Tensor&, const torch::Tensor&, const torch::Tensor&,
                                             const std::optional<torch::Tensor>&, const std::optional<torch::Tensor>&,
                                             const std::optional<torch::Tensor>&, const std::optional<torch::Tensor>&,
                                             const std::optional<torch::Tensor>&, const std::optional<torch::Tensor>&,
                                             int64_t, double, double, c10::string_view, bool, std::optional<double>,
                                             c10::string_view, int64_t, int64_t, double, bool)>()
                        .call(q, normalised.flatten(2), module->v_proj(x), {}, {}, module->sinks, {}, {}, {}, 16, 1e-6,
                              10000.0, "interleaved", true, {}, "auto", -1, -1, 0.0, true)),
      module->out_proj->weight, module->out_proj->bias);
  EXPECT_TRUE(torch::allclose(module->forward(x), expected, 1e-4, 1e-5));
}

TEST(Module, RefusesModulesThatItCannotCall) {
  SelfAttention module(SelfAttentionOptions(64));
  EXPECT_THROW(module->replace("q_norm", torch::nn::AnyModule(torch::nn::Identity())), c10::ValueError);
  EXPECT_THROW(module->replace("proj", torch::nn::AnyModule(torch::nn::Identity())), c10::ValueError);
  EXPECT_THROW(module->replace("q_proj", torch::nn::AnyModule()), c10::ValueError);
  EXPECT_TRUE(module->is_plain());
  module->replace_module("v_proj", torch::nn::Linear(64, 64));
  EXPECT_THROW(module->forward(torch::randn({1, 3, 64})), c10::ValueError);
  module->reset();
  EXPECT_EQ(module->forward(torch::randn({1, 3, 64})).size(1), 3);
}

TEST(Module, PrintsItsOptions) {
  std::ostringstream text;
  text << SelfAttention(every_option());
  EXPECT_NE(text.str().find("num_kv_heads=2"), std::string::npos) << text.str();
  EXPECT_NE(text.str().find("q_proj"), std::string::npos) << text.str();
}

}  // namespace
