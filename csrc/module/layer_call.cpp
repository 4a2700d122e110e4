#include "module/layer_call.h"

#include <selfattn/backend.h>

#include <utility>

#include "common/dense_tensor.h"
#include "common/plain_tensor.h"

namespace selfattn {
namespace {

/// A parameter of the layer: of x's device, and of its dtype unless autocast gives both another.
void check_parameter(const at::Tensor& parameter, const at::Tensor& x, const char* name) {
  check_floating_point(parameter, name, x.device(), "x");
  if (!is_autocast_on(x)) check_dtype(parameter, name, x.scalar_type(), "x");
}

void check_bias(const OptionalTensor& bias, const at::Tensor& weight, const at::Tensor& x, const char* name,
                const char* weight_name) {
  if (!bias) return;
  check_parameter(*bias, x, name);
  TORCH_CHECK_VALUE(bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0), "selfattn: ", name,
                    " must have the output features of ", weight_name, ", [", weight.sym_size(0), "]; got ",
                    bias->sym_sizes());
}

/// A projection to heads; gives their number.
c10::SymInt check_projection(const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& x,
                             int64_t head_dim, const char* name, const char* bias_name) {
  check_parameter(weight, x, name);
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.sym_size(1) == x.sym_size(2) && weight.sym_size(0) > 0 &&
                        weight.sym_size(0) % head_dim == 0,
                    "selfattn: ", name, " must have the shape (heads * head_dim, E) with head_dim ", head_dim,
                    " and E ", x.sym_size(2), "; got ", weight.sym_sizes());
  check_bias(bias, weight, x, bias_name, name);
  return weight.sym_size(0) / head_dim;
}

}  // namespace

void check_head_dim(int64_t head_dim) {
  TORCH_CHECK_VALUE(head_dim > 0 && head_dim % 2 == 0, "selfattn: head_dim must be positive and even; got ", head_dim);
}

void check_input(const at::Tensor& x, const at::Tensor& q_weight) {
  check_floating_point(x, "x");
  TORCH_CHECK_VALUE(x.dim() == 3, "selfattn: x must have three dimensions (B, S, E); got shape ", x.sym_sizes());
  check_dense(q_weight, "q_weight");
  TORCH_CHECK_TYPE(
      x.scalar_type() == q_weight.scalar_type() || !is_supported_dtype(q_weight.scalar_type()) || is_autocast_on(x),
      "selfattn: x must have the dtype of the weights, ", q_weight.scalar_type(), "; got ", x.scalar_type());
  TORCH_CHECK_VALUE(q_weight.dim() != 2 || q_weight.sym_size(1) == x.sym_size(2),
                    "selfattn: x must have the input features of q_weight, ", q_weight.sym_size(-1), "; got shape ",
                    x.sym_sizes());
}

c10::SymInt check_projections(const at::Tensor& x, const at::Tensor& q_weight, const at::Tensor& k_weight,
                              const at::Tensor& v_weight, const OptionalTensor& q_bias, const OptionalTensor& k_bias,
                              const OptionalTensor& v_bias, int64_t head_dim) {
  const c10::SymInt heads = check_projection(q_weight, q_bias, x, head_dim, "q_weight", "q_bias");
  const c10::SymInt kv_heads = check_projection(k_weight, k_bias, x, head_dim, "k_weight", "k_bias");
  TORCH_CHECK_VALUE(heads % kv_heads == 0, "selfattn: k_weight must have heads that divide those of q_weight, ", heads,
                    "; got ", kv_heads);
  check_projection(v_weight, v_bias, x, head_dim, "v_weight", "v_bias");
  TORCH_CHECK_VALUE(v_weight.sym_size(0) == k_weight.sym_size(0),
                    "selfattn: v_weight must have the shape of k_weight, ", k_weight.sym_sizes(), "; got ",
                    v_weight.sym_sizes());
  return heads;
}

void check_output_projection(const at::Tensor& out_weight, const OptionalTensor& out_bias, const at::Tensor& x,
                             const at::Tensor& q_weight) {
  check_parameter(out_weight, x, "out_weight");
  TORCH_CHECK_VALUE(out_weight.dim() == 2 && out_weight.sym_size(1) == q_weight.sym_size(0),
                    "selfattn: out_weight must have the shape (E, heads * head_dim) with ", q_weight.sym_size(0),
                    " input features; got ", out_weight.sym_sizes());
  check_bias(out_bias, out_weight, x, "out_bias", "out_weight");
}

void check_projected(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t head_dim) {
  check_floating_point(q, "q");
  for (const auto& [tensor, name] : {std::pair(&q, "q"), std::pair(&k, "k"), std::pair(&v, "v")}) {
    check_floating_point(*tensor, name, q.device(), "q");
    check_dtype(*tensor, name, q.scalar_type(), "q");
    TORCH_CHECK_VALUE(tensor->dim() == 3 && tensor->sym_size(2) > 0 && tensor->sym_size(2) % head_dim == 0,
                      "selfattn: ", name, " must have the shape (B, S, heads * head_dim) with head_dim ", head_dim,
                      "; got ", tensor->sym_sizes());
    TORCH_CHECK_VALUE(tensor->sym_size(0) == q.sym_size(0) && tensor->sym_size(1) == q.sym_size(1), "selfattn: ", name,
                      " must have the batch size and length of q, ", q.sym_sizes().slice(0, 2), "; got ",
                      tensor->sym_sizes().slice(0, 2));
  }
  TORCH_CHECK_VALUE(q.sym_size(2) % k.sym_size(2) == 0, "selfattn: k must have heads that divide those of q, ",
                    q.sym_size(2) / head_dim, "; got ", k.sym_size(2) / head_dim);
  TORCH_CHECK_VALUE(v.sym_size(2) == k.sym_size(2), "selfattn: v must have the shape of k, ", k.sym_sizes(), "; got ",
                    v.sym_sizes());
}

LayerCall make_layer_call(const at::Tensor& x, const char* x_name, const c10::SymInt& heads,
                          const OptionalTensor& q_norm_weight, const OptionalTensor& k_norm_weight,
                          const OptionalTensor& sinks, const OptionalTensor& freqs_sin, const OptionalTensor& freqs_cos,
                          const OptionalTensor& segment_ids, int64_t head_dim, double norm_eps, double rope_theta,
                          c10::string_view rope_pairing, bool causal, std::optional<double> qk_scale,
                          c10::string_view backend, int64_t window_left, int64_t window_right, double softcap,
                          bool rope) {
  parse_backend(backend);
  const AttentionArguments arguments{segment_ids, causal,       qk_scale, std::nullopt,
                                     window_left, window_right, softcap,  sinks};
  check_attention_numbers(arguments);
  TORCH_CHECK_VALUE(q_norm_weight.has_value() == k_norm_weight.has_value(),
                    "selfattn: q_norm_weight and k_norm_weight must be given together; got one alone");
  NormRopeCall norm_rope{.q_weight = q_norm_weight,
                         .k_weight = k_norm_weight,
                         .freqs_sin = freqs_sin,
                         .freqs_cos = freqs_cos,
                         .norm = q_norm_weight.has_value(),
                         .eps = norm_eps,
                         .rope = rope,
                         .theta = rope_theta,
                         .pairing = parse_pairing(rope_pairing, "rope_pairing")};
  const HeadsShape shape{x_name, x.sym_size(0), x.sym_size(1), head_dim, x.device()};
  check_norm_rope_options(
      norm_rope, shape, shape,
      {.q_weight = "q_norm_weight", .k_weight = "k_norm_weight", .eps = "norm_eps", .theta = "rope_theta"});
  if (segment_ids) check_token_integers(*segment_ids, "segment_ids", x, x_name);
  if (sinks) check_sinks(*sinks, heads, x.device(), x_name);
  return {std::move(norm_rope), arguments, backend, head_dim};
}

}  // namespace selfattn
