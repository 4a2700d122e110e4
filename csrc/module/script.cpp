// A SelfAttention as a TorchScript module, built in C++ alone.
#include <selfattn/script.h>
#include <torch/csrc/jit/frontend/resolver.h>
#include <torch/csrc/jit/frontend/sugared_value.h>

namespace selfattn {
namespace {

/// Module::define cannot see torch.ops; this resolves the name `selfattn` to the operators of that namespace. Nor does
/// it know Python's exceptions.
struct OperatorResolver : torch::jit::NativeResolver {
  std::shared_ptr<torch::jit::SugaredValue> resolveValue(const std::string& name, torch::jit::GraphFunction& function,
                                                         const torch::jit::SourceRange& location) override {
    if (name == "selfattn") return std::make_shared<torch::jit::BuiltinModule>("selfattn");
    if (name == "ValueError") return std::make_shared<torch::jit::ExceptionValue>(name);
    return torch::jit::NativeResolver::resolveValue(name, function, location);
  }
};

void add_child(torch::jit::Module& parent, const std::string& name, const char* type,
               const std::initializer_list<std::pair<const char*, torch::Tensor>>& parameters) {
  torch::jit::Module child{c10::QualifiedName(type)};
  for (const auto& [parameter, tensor] : parameters) {
    if (tensor.defined()) child.register_parameter(parameter, tensor, /*is_buffer=*/false);
  }
  parent.register_module(name, child);
}

/// What stands for an optional parameter in the source: its name, or None.
std::string name_or_none(bool is_present, const char* name) { return is_present ? name : "None"; }

/// Of the tokens' slots, or of positions 0 .. S - 1. 7 and 6: float64 and float32.
constexpr const char* kMakeTables = R"(
    if sin is None and cos is None:
        positions: Optional[Tensor] = None
        max_length: Optional[int] = x.size(1)
        if cache is not None:
            if self.rope_length is None and (self.rope_type == "dynamic" or self.rope_type == "longrope"):
                raise ValueError("selfattn: rope_length must be given for a cache with rope_type " + self.rope_type)
            page_table = cache[3]
            capacity = cache[0].size(1)
            if page_table is not None:
                capacity = capacity * page_table.size(1)
            lengths, positions = selfattn.positions_of_append(cache[2], segment_ids, x.size(1), capacity)
            max_length = None
        sin, cos = selfattn.rope_tables(
            self.rotary_dim, positions, max_length, rope_type=self.rope_type, rope_theta=self.rope_theta,
            length=self.rope_length, factor=self.rope_factor,
            original_max_position_embeddings=self.rope_original_max_position_embeddings,
            low_freq_factor=self.rope_low_freq_factor, high_freq_factor=self.rope_high_freq_factor,
            attention_factor=self.rope_attention_factor, beta_fast=self.rope_beta_fast, beta_slow=self.rope_beta_slow,
            mscale=self.rope_mscale, mscale_all_dim=self.rope_mscale_all_dim, truncate=self.rope_truncate,
            short_factor=self.rope_short_factor, long_factor=self.rope_long_factor,
            dtype=7 if x.dtype == 7 else 6, device=x.device)
)";

template <typename Value>
void register_optional(torch::jit::Module& script, const char* name, const c10::TypePtr& type,
                       const std::optional<Value>& value) {
  script.register_attribute(name, c10::OptionalType::create(type), value ? c10::IValue(*value) : c10::IValue());
}

void register_rotation(torch::jit::Module& script, const RopeParameters& of, std::optional<int64_t> length) {
  const c10::TypePtr real = c10::FloatType::get(), reals = c10::ListType::ofFloats();
  script.register_attribute("rotary_dim", c10::IntType::get(), of.rotary_dim());
  script.register_attribute("rope_type", c10::StringType::get(), of.rope_type());
  register_optional(script, "rope_length", c10::IntType::get(), length);
  register_optional(script, "rope_factor", real, of.factor());
  register_optional(script, "rope_original_max_position_embeddings", c10::IntType::get(),
                    of.original_max_position_embeddings());
  register_optional(script, "rope_low_freq_factor", real, of.low_freq_factor());
  register_optional(script, "rope_high_freq_factor", real, of.high_freq_factor());
  register_optional(script, "rope_attention_factor", real, of.attention_factor());
  register_optional(script, "rope_beta_fast", real, of.beta_fast());
  register_optional(script, "rope_beta_slow", real, of.beta_slow());
  register_optional(script, "rope_mscale", real, of.mscale());
  register_optional(script, "rope_mscale_all_dim", real, of.mscale_all_dim());
  register_optional(script, "rope_truncate", c10::BoolType::get(), of.truncate());
  register_optional(script, "rope_short_factor", reals, of.short_factor());
  register_optional(script, "rope_long_factor", reals, of.long_factor());
}

std::string forward_source(const SelfAttentionOptions& options, bool makes_tables) {
  const bool qkv_bias = options.qkv_bias().value_or(options.use_bias()),
             out_bias = options.out_bias().value_or(options.use_bias());
  std::string norm_factors;
  for (const char* of : {"q", "k"}) {
    if (!options.qk_norm()) continue;
    const std::string factor = std::string(of) + "_factor", weight = "self." + std::string(of) + "_norm.weight";
    norm_factors += "    " + factor + " = " + weight + "\n";
    // 7: float64. TorchScript's 1 + w in at least float32, as HeadNorm::factor.
    if (options.norm_unit_offset()) {
      norm_factors += "    if " + factor + ".dtype != 7:\n        " + factor + " = " + factor + ".float()\n    " +
                      factor + " = " + factor + " + 1.0\n";
    }
  }
  const std::string begin = R"(
def forward(self, x, freqs: Optional[Tuple[Tensor, Tensor]] = None, segment_ids: Optional[Tensor] = None,
            cache: Optional[Tuple[Tensor, Tensor, Tensor, Optional[Tensor]]] = None) -> Tensor:
    sin: Optional[Tensor] = None
    cos: Optional[Tensor] = None
    if freqs is not None:
        sin, cos = freqs
)" + std::string(makes_tables ? kMakeTables : "") +
                            norm_factors;
  const std::string qkv_biases = name_or_none(qkv_bias, "self.q_proj.bias") + ", " +
                                 name_or_none(qkv_bias, "self.k_proj.bias") + ", " +
                                 name_or_none(qkv_bias, "self.v_proj.bias");
  const std::string own_out_bias = name_or_none(out_bias, "self.out_proj.bias");
  const std::string sinks = name_or_none(options.sinks(), "self.sinks");
  const std::string call = R"(, sin, cos, segment_ids,
        head_dim=self.head_dim, norm_eps=self.norm_eps, rope_theta=self.rope_theta, rope_pairing=self.rope_pairing,
        causal=self.causal, qk_scale=self.qk_scale, backend=self.attention_backend, window_left=self.window_left,
        window_right=self.window_right, softcap=self.softcap, rope=self.rope)";
  const std::string cached_call =
      call + ", k_cache=cache[0], v_cache=cache[1], lengths=cache[2], page_table=cache[3])\n";
  if (options.qk_norm() && options.qk_norm_scope() == "projection") {
    return begin + R"(
    q, k, v = selfattn.project_query_key_value(
        x, self.q_proj.weight, self.k_proj.weight, self.v_proj.weight, )" +
           qkv_biases + R"()
    q = torch.rms_norm(q.to(q_factor.dtype), q_factor.size(), q_factor, self.norm_eps).to(q.dtype)
    k = torch.rms_norm(k.to(k_factor.dtype), k_factor.size(), k_factor, self.norm_eps).to(k.dtype)
    if cache is None:
        heads = selfattn.projected_attention(q, k, v, None, None, )" +
           sinks + call + R"()
    else:
        heads = selfattn.projected_attention_kv_cache(q, k, v, None, None, )" +
           sinks + cached_call + R"(
    return torch.dropout(torch.linear(heads, self.out_proj.weight, )" +
           own_out_bias + "), self.dropout_rate, self.training)\n";
  }
  const std::string weights = R"(
            x, self.q_proj.weight, self.k_proj.weight, self.v_proj.weight, self.out_proj.weight, )" +
                              qkv_biases + ", " + own_out_bias + ", " + name_or_none(options.qk_norm(), "q_factor") +
                              ", " + name_or_none(options.qk_norm(), "k_factor") + ", " + sinks;
  return begin + R"(
    if cache is not None:
        out = selfattn.self_attention_kv_cache()" +
         weights + cached_call + R"(
        return torch.dropout(out, self.dropout_rate, self.training)
    return selfattn.self_attention()" +
         weights + call + ", dropout_rate=self.dropout_rate, training=self.training)\n";
}

}  // namespace

torch::jit::Module to_torchscript(const SelfAttention& module) {
  TORCH_CHECK_VALUE(
      !module->is_replaced(),
      "selfattn: module must have its own projections and norms to become TorchScript; some were replaced");
  const SelfAttentionOptions& options = module->options;
  torch::jit::Module script{c10::QualifiedName("selfattn.SelfAttention")};
  add_child(script, "q_proj", "selfattn.QueryProjection",
            {{"weight", module->q_proj->weight}, {"bias", module->q_proj->bias}});
  add_child(script, "k_proj", "selfattn.KeyProjection",
            {{"weight", module->k_proj->weight}, {"bias", module->k_proj->bias}});
  add_child(script, "v_proj", "selfattn.ValueProjection",
            {{"weight", module->v_proj->weight}, {"bias", module->v_proj->bias}});
  add_child(script, "out_proj", "selfattn.OutputProjection",
            {{"weight", module->out_proj->weight}, {"bias", module->out_proj->bias}});
  if (options.qk_norm()) {
    add_child(script, "q_norm", "selfattn.QueryNorm", {{"weight", module->q_norm->weight}});
    add_child(script, "k_norm", "selfattn.KeyNorm", {{"weight", module->k_norm->weight}});
  }
  if (options.sinks()) script.register_parameter("sinks", module->sinks, /*is_buffer=*/false);

  script.register_attribute("training", c10::BoolType::get(), module->is_training());
  script.register_attribute("head_dim", c10::IntType::get(), options.head_dim());
  script.register_attribute("norm_eps", c10::FloatType::get(), options.norm_eps());
  script.register_attribute("rope_theta", c10::FloatType::get(), module->rope_parameters().rope_theta());
  if (module->makes_tables()) register_rotation(script, module->rope_parameters(), options.rope_length());
  script.register_attribute("rope_pairing", c10::StringType::get(), options.rope_pairing());
  script.register_attribute("qk_scale", c10::OptionalType::create(c10::FloatType::get()),
                            options.qk_scale() ? c10::IValue(*options.qk_scale()) : c10::IValue());
  script.register_attribute("rope", c10::BoolType::get(), options.rope());
  script.register_attribute("causal", c10::BoolType::get(), options.causal());
  script.register_attribute("attention_backend", c10::StringType::get(), options.attention_backend());
  script.register_attribute("window_left", c10::IntType::get(), options.window_left());
  script.register_attribute("window_right", c10::IntType::get(), options.window_right());
  script.register_attribute("softcap", c10::FloatType::get(), options.softcap());
  script.register_attribute("dropout_rate", c10::FloatType::get(), options.dropout_rate());
  script.define(forward_source(options, module->makes_tables()), std::make_shared<OperatorResolver>());
  return script;
}

}  // namespace selfattn
