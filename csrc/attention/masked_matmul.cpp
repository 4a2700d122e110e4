#include "attention/masked_matmul.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/where.h>
#include <c10/core/SymIntArrayRef.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>

#include <limits>

#include "common/function_transform.h"
#include "segment/segment_ids.h"

namespace selfattn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

at::Tensor transposed(const at::Tensor& matrix) { return matrix.transpose(-1, -2); }

/// Whether the host may look, and sees nothing but finite values. What torch.jit.trace records must serve all values.
bool is_known_finite(const at::Tensor& tensor) {
  return has_readable_values(tensor) && !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Tracer) &&
         at::isfinite(tensor).all().item<bool>();
}

enum class WeightSide { kLeft, kRight };

/// weight value, or value weight.
at::Tensor multiply(const at::Tensor& weight, const at::Tensor& value, WeightSide side) {
  return side == WeightSide::kLeft ? at::matmul(weight, value) : at::matmul(value, weight);
}

/// Where a pair of `pairs` meets a mark of `marks`, both bool, in the place of weight and value.
at::Tensor meets(const at::Tensor& pairs, const at::Tensor& marks, WeightSide side) {
  // A sum of zeros and ones is positive in any precision.
  const auto dtype = pairs.is_cuda() ? at::kHalf : at::kFloat;
  return multiply(pairs.to(dtype), marks.to(dtype), side) > 0.0;
}

at::Tensor compute_scores(const at::Tensor& query, const at::Tensor& key_transposed, const at::Tensor& allowed) {
  return at::where(allowed, at::matmul(query, key_transposed), 0.0);
}

at::Tensor compute_product(const at::Tensor& any_weight, const at::Tensor& value, const at::Tensor& allowed,
                           WeightSide side) {
  const at::Tensor weight = at::where(allowed, any_weight, 0.0);
  if (is_known_finite(value)) return multiply(weight, value, side);

  // The finite values are multiplied, and what the others come to over the allowed pairs is put in its place.
  const at::Tensor is_plus = value == kInfinity, is_minus = value == -kInfinity;
  const at::Tensor is_nan = value != value;
  const at::Tensor is_infinite = is_plus.logical_or(is_minus);
  const at::Tensor is_positive = weight > 0.0, is_negative = weight < 0.0;
  const at::Tensor is_zero = at::logical_and(weight == 0.0, allowed);
  const at::Tensor gives_plus = meets(is_positive, is_plus, side).logical_or(meets(is_negative, is_minus, side));
  const at::Tensor gives_minus = meets(is_positive, is_minus, side).logical_or(meets(is_negative, is_plus, side));
  const at::Tensor gives_nan =
      meets(allowed.expand_as(weight), is_nan, side).logical_or(meets(is_zero, is_infinite, side));
  // Not masked_fill: its result has other strides, and the product of a matrix in another layout other bits.
  const at::Tensor finite_value = at::where(is_infinite.logical_or(is_nan), 0.0, value);
  at::Tensor result = multiply(weight, finite_value, side);
  result = at::where(gives_plus, result + kInfinity, result);
  result = at::where(gives_minus, result - kInfinity, result);
  return at::where(gives_nan, std::numeric_limits<double>::quiet_NaN(), result);
}

// The two differentiable products, of tensors with equal leading dimensions. Each gradient is the product that autograd
// takes for the gradient of a plain one, so that it has the same bits.
at::Tensor masked_scores_of(const at::Tensor& query, const at::Tensor& key_transposed, const at::Tensor& allowed);
at::Tensor masked_product_of(const at::Tensor& weight, const at::Tensor& value, const at::Tensor& allowed,
                             WeightSide side);

class MaskedScores : public torch::autograd::Function<MaskedScores> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& query, const at::Tensor& key_transposed,
                            const at::Tensor& allowed) {
    context->save_for_backward({query, key_transposed, allowed});
    return compute_scores(query, key_transposed, allowed);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const at::Tensor &query = saved[0], &key_transposed = saved[1], &allowed = saved[2], &grad = grads[0];
    at::Tensor grad_query, grad_key;
    if (context->needs_input_grad(0)) {
      grad_query = masked_product_of(grad, transposed(key_transposed), allowed, WeightSide::kLeft);
    }
    if (context->needs_input_grad(1)) {
      grad_key = masked_product_of(grad, transposed(query), allowed, WeightSide::kRight);
    }
    return {grad_query, grad_key, at::Tensor()};
  }
};

class MaskedProduct : public torch::autograd::Function<MaskedProduct> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& weight, const at::Tensor& value,
                            const at::Tensor& allowed, WeightSide side) {
    context->save_for_backward({weight, value, allowed});
    context->saved_data["is_left"] = side == WeightSide::kLeft;
    return compute_product(weight, value, allowed, side);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const at::Tensor &weight = saved[0], &value = saved[1], &allowed = saved[2], &grad = grads[0];
    const bool is_left = context->saved_data["is_left"].toBool();
    at::Tensor grad_weight, grad_value;
    if (context->needs_input_grad(0)) {
      grad_weight = is_left ? masked_scores_of(grad, transposed(value), allowed)
                            : masked_scores_of(transposed(value), grad, allowed);
    }
    if (context->needs_input_grad(1)) {
      grad_value = masked_product_of(transposed(weight), grad, transposed(allowed),
                                     is_left ? WeightSide::kLeft : WeightSide::kRight);
    }
    return {grad_weight, grad_value, at::Tensor(), at::Tensor()};
  }
};

/// Of torch.autograd.grad(is_grads_batched=True), whose vmap is not one of torch.func's.
bool is_batched(const at::Tensor& tensor) { return tensor.key_set().has(c10::DispatchKey::Batched); }

bool may_run_function(const at::Tensor& left, const at::Tensor& right) {
  return !is_function_transform_active() && !has_tangent(left) && !has_tangent(right) && !is_batched(left) &&
         !is_batched(right);
}

at::Tensor masked_scores_of(const at::Tensor& query, const at::Tensor& key_transposed, const at::Tensor& allowed) {
  if (!may_run_function(query, key_transposed)) return at::matmul(query, key_transposed);
  return MaskedScores::apply(query, key_transposed, allowed);
}

at::Tensor masked_product_of(const at::Tensor& weight, const at::Tensor& value, const at::Tensor& allowed,
                             WeightSide side) {
  if (!may_run_function(weight, value)) return multiply(weight, value, side);
  return MaskedProduct::apply(weight, value, allowed, side);
}

/// `matrix` with the leading dimensions of `like`, laid out as at::matmul would, which then takes it and its transpose
/// as they are.
at::Tensor with_batch_of(const at::Tensor& matrix, const at::Tensor& like) {
  c10::SymDimVector sizes(like.sym_sizes().begin(), like.sym_sizes().end());
  sizes[sizes.size() - 2] = matrix.sym_size(-2);
  sizes[sizes.size() - 1] = matrix.sym_size(-1);
  const c10::SymInt count = c10::multiply_integers(sizes.begin(), sizes.end() - 2);
  return matrix.expand_symint(sizes)
      .reshape_symint({count, matrix.sym_size(-2), matrix.sym_size(-1)})
      .view_symint(sizes);
}

}  // namespace

at::Tensor masked_scores(const at::Tensor& query, const at::Tensor& key, const std::optional<at::Tensor>& allowed) {
  if (!allowed || !may_run_function(query, key)) return at::matmul(query, transposed(key));
  return masked_scores_of(with_batch_of(query, query), with_batch_of(transposed(key), query), *allowed);
}

at::Tensor masked_product(const at::Tensor& weight, const at::Tensor& value, const std::optional<at::Tensor>& allowed) {
  if (!allowed || !may_run_function(weight, value)) return at::matmul(weight, value);
  return masked_product_of(with_batch_of(weight, weight), with_batch_of(value, weight), *allowed, WeightSide::kLeft);
}

}  // namespace selfattn
