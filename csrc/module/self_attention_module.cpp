// The C++ module: parameters and options; its forward is the operator self_attention.
#include <c10/util/Exception.h>
#include <selfattn/backend.h>
#include <selfattn/self_attention.h>
#include <torch/nn/init.h>

#include <cmath>

#include "attention/problem.h"
#include "rotary/frequencies.h"
#include "rotary/rotary.h"

namespace selfattn {
namespace {

void check_rotation(const SelfAttentionOptions& options) {
  const auto& scaling = options.rope_scaling();
  TORCH_CHECK_VALUE(options.rope() || (!options.rotary_dim() && !scaling && !options.rope_length()),
                    "selfattn: rotary_dim, rope_scaling and rope_length must not be given where rope is false");
  const int64_t rotary_dim = options.rotary_dim().value_or(options.head_dim());
  TORCH_CHECK_VALUE(rotary_dim > 0 && rotary_dim % 2 == 0 && rotary_dim <= options.head_dim(),
                    "selfattn: rotary_dim must be positive, even and at most head_dim, ", options.head_dim(), "; got ",
                    rotary_dim);
  TORCH_CHECK_VALUE(!options.rope_length() || (scaling && depends_on_length(*scaling) && *options.rope_length() > 0),
                    "selfattn: rope_length must be positive, and given only for a rope_scaling that depends on the "
                    "length; got ",
                    options.rope_length().value_or(0));
  if (!scaling) return;
  check(*scaling);
  TORCH_CHECK_VALUE(scaling->rotary_dim() <= options.head_dim(),
                    "selfattn: rope_scaling must have a rotary_dim of at most head_dim, ", options.head_dim(), "; got ",
                    scaling->rotary_dim());
  TORCH_CHECK_VALUE(options.rotary_dim().value_or(scaling->rotary_dim()) == scaling->rotary_dim(),
                    "selfattn: rotary_dim must be that of rope_scaling, ", scaling->rotary_dim(), "; got ", rotary_dim);
  const double default_theta = SelfAttentionOptions(1).rope_theta();
  TORCH_CHECK_VALUE(options.rope_theta() == default_theta || options.rope_theta() == scaling->rope_theta(),
                    "selfattn: rope_theta must be that of rope_scaling, ", scaling->rope_theta(), "; got ",
                    options.rope_theta());
}

void check(const SelfAttentionOptions& options) {
  TORCH_CHECK_VALUE(options.head_dim() > 0 && options.head_dim() % 2 == 0,
                    "selfattn: head_dim must be positive and even; got ", options.head_dim());
  TORCH_CHECK_VALUE(
      options.embedding_dim() > 0 && (options.num_heads() || options.embedding_dim() % options.head_dim() == 0),
      "selfattn: embedding_dim must be a positive multiple of head_dim ", options.head_dim(),
      " unless num_heads is given; got ", options.embedding_dim());
  TORCH_CHECK_VALUE(options.num_heads().value_or(1) > 0, "selfattn: num_heads must be positive; got ",
                    *options.num_heads());
  const int64_t heads = options.num_heads().value_or(options.embedding_dim() / options.head_dim());
  TORCH_CHECK_VALUE(!options.num_kv_heads() || (*options.num_kv_heads() > 0 && heads % *options.num_kv_heads() == 0),
                    "selfattn: num_kv_heads must divide the ", heads, " query heads; got ", *options.num_kv_heads());
  TORCH_CHECK_VALUE(options.num_layers() > 0, "selfattn: num_layers must be positive; got ", options.num_layers());
  TORCH_CHECK_VALUE(options.dropout_rate() >= 0.0 && options.dropout_rate() < 1.0,
                    "selfattn: dropout_rate must be at least 0 and below 1; got ", options.dropout_rate());
  TORCH_CHECK_VALUE(std::isfinite(options.norm_eps()) && options.norm_eps() >= 0.0,
                    "selfattn: norm_eps must be finite and at least 0; got ", options.norm_eps());
  check_attention_numbers({.qk_scale = options.qk_scale(),
                           .window_left = options.window_left(),
                           .window_right = options.window_right(),
                           .softcap = options.softcap()});
  TORCH_CHECK_VALUE(options.qk_norm_scope() == "head" || (options.qk_norm() && options.qk_norm_scope() == "projection"),
                    "selfattn: qk_norm_scope must be head, or with qk_norm projection; got ", options.qk_norm_scope());
  TORCH_CHECK_VALUE(options.qk_norm() || !options.norm_unit_offset(),
                    "selfattn: norm_unit_offset must be false without qk_norm; got true");
  TORCH_CHECK_VALUE(std::isfinite(options.rope_theta()) && options.rope_theta() > 0.0,
                    "selfattn: rope_theta must be positive and finite; got ", options.rope_theta());
  parse_pairing(options.rope_pairing(), "rope_pairing");
  check_rotation(options);
  parse_backend(options.attention_backend());
}

}  // namespace

HeadNormImpl::HeadNormImpl(int64_t features, bool unit_offset) : features_(features), unit_offset_(unit_offset) {
  reset();
}

void HeadNormImpl::reset() {
  parameters_.clear();
  weight = register_parameter("weight", unit_offset_ ? torch::zeros({features_}) : torch::ones({features_}));
}

torch::Tensor HeadNormImpl::factor() const {
  if (!unit_offset_) return weight;
  return 1.0 + (weight.scalar_type() == torch::kDouble ? weight : weight.to(torch::kFloat));
}

void HeadNormImpl::pretty_print(std::ostream& stream) const {
  stream << "selfattn::HeadNorm(features=" << features_ << ")";
}

SelfAttentionImpl::SelfAttentionImpl(SelfAttentionOptions options_) : options(std::move(options_)) {
  check(options);
  reset();
}

void SelfAttentionImpl::reset() {
  for (const std::string& name : named_children().keys()) unregister_module(name);
  replaced_.clear();
  parameters_.clear();
  const auto linear = [&](const char* name, int64_t in_features, int64_t out_features, std::optional<bool> bias) {
    const auto linear_options =
        torch::nn::LinearOptions(in_features, out_features).bias(bias.value_or(options.use_bias()));
    return register_module(name, torch::nn::Linear(linear_options));
  };
  const int64_t q_features = num_heads() * options.head_dim(), kv_features = num_kv_heads() * options.head_dim();
  q_proj = linear("q_proj", options.embedding_dim(), q_features, options.qkv_bias());
  k_proj = linear("k_proj", options.embedding_dim(), kv_features, options.qkv_bias());
  v_proj = linear("v_proj", options.embedding_dim(), kv_features, options.qkv_bias());
  out_proj = linear("out_proj", q_features, options.embedding_dim(), options.out_bias());
  if (options.qk_norm()) {
    q_norm = register_module(
        "q_norm", HeadNorm(normalises_projections() ? q_features : options.head_dim(), options.norm_unit_offset()));
    k_norm = register_module(
        "k_norm", HeadNorm(normalises_projections() ? kv_features : options.head_dim(), options.norm_unit_offset()));
  }
  if (options.sinks()) sinks = register_parameter("sinks", torch::zeros({num_heads()}));
  reset_parameters();
}

void SelfAttentionImpl::replace(const std::string& name, torch::nn::AnyModule module) {
  const bool is_norm = name == "q_norm" || name == "k_norm";
  TORCH_CHECK_VALUE(is_norm || name == "q_proj" || name == "k_proj" || name == "v_proj" || name == "out_proj",
                    "selfattn: name must be q_proj, k_proj, v_proj, out_proj, q_norm or k_norm; got ", name);
  TORCH_CHECK_VALUE(!is_norm || options.qk_norm(), "selfattn: name must be that of a projection in a layer without ",
                    "qk_norm; got ", name);
  TORCH_CHECK_VALUE(!module.is_empty(), "selfattn: module must hold a module; got an empty AnyModule");
  replace_module(name, module.ptr());
  replaced_[name] = std::move(module);
}

void SelfAttentionImpl::check_children() const {
  const auto children = named_children();
  const auto check_child = [&](const char* name, const torch::nn::Module* own) {
    if (!own) return;
    const auto found = replaced_.find(name);
    const torch::nn::Module* expected = found == replaced_.end() ? own : found->second.ptr().get();
    const auto* child = children.find(name);
    TORCH_CHECK_VALUE(child && child->get() == expected, "selfattn: ", name,
                      " is another module than the layer's own; put modules in its place by SelfAttention::replace");
  };
  check_child("q_proj", q_proj.get()), check_child("k_proj", k_proj.get()), check_child("v_proj", v_proj.get());
  check_child("out_proj", out_proj.get());
  if (q_norm) check_child("q_norm", q_norm.get()), check_child("k_norm", k_norm.get());
}

RopeParameters SelfAttentionImpl::rope_parameters() const {
  if (options.rope_scaling()) return *options.rope_scaling();
  return RopeParameters(options.rotary_dim().value_or(options.head_dim())).rope_theta(options.rope_theta());
}

void SelfAttentionImpl::reset_parameters() {
  const torch::NoGradGuard no_grad;
  const double embedding_dim = static_cast<double>(options.embedding_dim());
  for (auto* projection : {&q_proj, &k_proj, &v_proj}) {
    torch::nn::init::normal_((*projection)->weight, 0.0, std::sqrt(2.0 / (5.0 * embedding_dim)));
  }
  const double out_std = 2.0 / (2.0 * static_cast<double>(options.num_layers())) / std::sqrt(embedding_dim);
  torch::nn::init::normal_(out_proj->weight, 0.0, out_std);
  for (auto* projection : {&q_proj, &k_proj, &v_proj, &out_proj}) {
    if ((*projection)->bias.defined()) torch::nn::init::zeros_((*projection)->bias);
  }
  if (options.qk_norm()) {
    for (auto* norm : {&q_norm, &k_norm}) {
      torch::nn::init::constant_((*norm)->weight, options.norm_unit_offset() ? 0.0 : 1.0);
    }
  }
  if (options.sinks()) torch::nn::init::zeros_(sinks);
}

void SelfAttentionImpl::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "selfattn::SelfAttention(embedding_dim=" << options.embedding_dim()
         << ", num_heads=" << num_heads() << ", num_kv_heads=" << num_kv_heads() << ", head_dim=" << options.head_dim()
         << ", qk_norm=" << options.qk_norm() << ", use_bias=" << options.use_bias() << ", causal=" << options.causal()
         << ", qk_scale=" << options.qk_scale().value_or(1.0 / std::sqrt(static_cast<double>(options.head_dim())))
         << ", window=(" << options.window_left() << ", " << options.window_right()
         << "), softcap=" << options.softcap() << ", sinks=" << options.sinks()
         << ", dropout_rate=" << options.dropout_rate() << ", attention_backend=" << options.attention_backend() << ")";
}

}  // namespace selfattn
