#include "attention/masked_matmul.h"

#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/where.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>

#include <limits>

#include "attention/function_transform.h"
#include "segment/segment_ids.h"

namespace selfattn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

at::Tensor transposed(const at::Tensor& matrix) { return matrix.transpose(-1, -2); }

at::Tensor compute_scores(const at::Tensor& query, const at::Tensor& key, const at::Tensor& allowed) {
  return at::where(allowed, at::matmul(query, transposed(key)), 0.0);
}

/// Whether the host may look, and sees nothing but finite values. What torch.jit.trace records must serve all values.
bool is_known_finite(const at::Tensor& tensor) {
  return has_readable_values(tensor) && !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Tracer) &&
         at::isfinite(tensor).all().item<bool>();
}

/// Where the row of `pairs` (..., Sq, Skv) meets a row of `marks` (..., Skv, D): both bool.
at::Tensor meets(const at::Tensor& pairs, const at::Tensor& marks) {
  // A sum of zeros and ones is positive in any precision.
  const auto dtype = pairs.is_cuda() ? at::kHalf : at::kFloat;
  return at::matmul(pairs.to(dtype), marks.to(dtype)) > 0.0;
}

at::Tensor compute_product(const at::Tensor& any_weight, const at::Tensor& value, const at::Tensor& allowed) {
  const at::Tensor weight = at::where(allowed, any_weight, 0.0);
  if (is_known_finite(value)) return at::matmul(weight, value);

  // The finite values are multiplied, and what the others come to over the allowed pairs is put in its place.
  const at::Tensor is_plus = value == kInfinity, is_minus = value == -kInfinity;
  const at::Tensor is_nan = value != value;
  const at::Tensor is_infinite = is_plus.logical_or(is_minus);
  const at::Tensor product = at::matmul(weight, value.masked_fill(is_infinite.logical_or(is_nan), 0.0));
  const at::Tensor infinities = meets(weight > 0.0, at::cat({is_plus, is_minus}, -1))
                                    .logical_or(meets(weight < 0.0, at::cat({is_minus, is_plus}, -1)));
  const c10::SymInt columns = value.sym_size(-1);
  const at::Tensor gives_plus = infinities.narrow_symint(-1, 0, columns);
  const at::Tensor gives_minus = infinities.narrow_symint(-1, columns, columns);
  const at::Tensor gives_nan =
      meets(allowed, is_nan).logical_or(meets(at::logical_and(weight == 0.0, allowed), is_infinite));
  at::Tensor result = at::where(gives_plus, product + kInfinity, product);
  result = at::where(gives_minus, result - kInfinity, result);
  return at::where(gives_nan, std::numeric_limits<double>::quiet_NaN(), result);
}

at::Tensor sum_to_shape_of(const at::Tensor& gradient, const at::Tensor& tensor) {
  return at::sum_to(gradient, tensor.sym_sizes());
}

class MaskedScores : public torch::autograd::Function<MaskedScores> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& query, const at::Tensor& key,
                            const at::Tensor& allowed) {
    context->save_for_backward({query, key, allowed});
    return compute_scores(query, key, allowed);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const at::Tensor &query = saved[0], &key = saved[1], &allowed = saved[2], &grad = grads[0];
    at::Tensor grad_query, grad_key;
    if (context->needs_input_grad(0)) grad_query = sum_to_shape_of(masked_product(grad, key, allowed), query);
    if (context->needs_input_grad(1)) {
      grad_key = sum_to_shape_of(masked_product(transposed(grad), query, transposed(allowed)), key);
    }
    return {grad_query, grad_key, at::Tensor()};
  }
};

class MaskedProduct : public torch::autograd::Function<MaskedProduct> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& weight, const at::Tensor& value,
                            const at::Tensor& allowed) {
    context->save_for_backward({weight, value, allowed});
    return compute_product(weight, value, allowed);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const at::Tensor &weight = saved[0], &value = saved[1], &allowed = saved[2], &grad = grads[0];
    at::Tensor grad_weight, grad_value;
    if (context->needs_input_grad(0)) grad_weight = sum_to_shape_of(masked_scores(grad, value, allowed), weight);
    if (context->needs_input_grad(1)) {
      grad_value = sum_to_shape_of(masked_product(transposed(weight), grad, transposed(allowed)), value);
    }
    return {grad_weight, grad_value, at::Tensor()};
  }
};

/// Of torch.autograd.grad(is_grads_batched=True), whose vmap is not one of torch.func's.
bool is_batched(const at::Tensor& tensor) { return tensor.key_set().has(c10::DispatchKey::Batched); }

bool may_run_function(const at::Tensor& left, const at::Tensor& right) {
  return !is_function_transform_active() && !has_tangent(left) && !has_tangent(right) && !is_batched(left) &&
         !is_batched(right);
}

}  // namespace

at::Tensor masked_scores(const at::Tensor& query, const at::Tensor& key, const std::optional<at::Tensor>& allowed) {
  if (!allowed || !may_run_function(query, key)) return at::matmul(query, transposed(key));
  return MaskedScores::apply(query, key, *allowed);
}

at::Tensor masked_product(const at::Tensor& weight, const at::Tensor& value, const std::optional<at::Tensor>& allowed) {
  if (!allowed || !may_run_function(weight, value)) return at::matmul(weight, value);
  return MaskedProduct::apply(weight, value, *allowed);
}

}  // namespace selfattn
