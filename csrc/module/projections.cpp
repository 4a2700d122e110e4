#include "module/projections.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/linear.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "common/function_transform.h"
#include "common/plain_tensor.h"

namespace selfattn {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

constexpr size_t kProjections = 3;

/// (B, S, F) -> (B * S, F); a view wherever strides allow.
at::Tensor as_rows(const at::Tensor& x) { return x.reshape({x.size(0) * x.size(1), x.size(2)}); }

}  // namespace

/// With a name that other files could see: it is what profilers and grad_fn show.
class QueryKeyValueProjections : public torch::autograd::Function<QueryKeyValueProjections> {
 public:
  // Places of the inputs. Those of the biases among the node's edges count only biases that are there.
  static constexpr size_t kX = 0, kWeights = 1, kBiases = kWeights + kProjections, kInputs = kBiases + kProjections;

  static variable_list forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& q_weight,
                               const at::Tensor& k_weight, const at::Tensor& v_weight, const OptionalTensor& q_bias,
                               const OptionalTensor& k_bias, const OptionalTensor& v_bias) {
    at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({x, q_weight, k_weight, v_weight});
    context->set_materialize_grads(false);
    context->saved_data["has_bias"] = c10::List<bool>({q_bias.has_value(), k_bias.has_value(), v_bias.has_value()});
    return {at::linear(x, q_weight, q_bias), at::linear(x, k_weight, k_bias), at::linear(x, v_weight, v_bias)};
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    // Forward, autocast was off; a backward pass inside an autocast region must not mix dtypes.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const variable_list saved = context->get_saved_variables();
    const at::Tensor x_rows = as_rows(saved[kX]);
    variable_list results(kInputs);
    at::Tensor dx;
    const c10::List<bool> has_bias = context->saved_data.at("has_bias").toBoolList();
    size_t bias_edge = kBiases;
    for (size_t i = 0; i < kProjections; ++i) {
      const bool needs_bias = has_bias[i] && context->needs_input_grad(bias_edge++);
      if (!grads[i].defined()) continue;
      const at::Tensor grad = as_rows(grads[i]);
      if (context->needs_input_grad(kX)) {
        const at::Tensor& weight = saved[kWeights + i];
        if (!dx.defined()) {
          dx = grad.mm(weight);
        } else if (is_wrapped_by_transform(grad) || is_wrapped_by_transform(dx)) {
          dx = dx + grad.mm(weight);  // a transform has no rule for what follows
        } else {
          // In place: the library of matrix products adds in its accumulator, where autograd would add tensors.
          dx.addmm_(grad, weight);
        }
      }
      if (context->needs_input_grad(kWeights + i)) results[kWeights + i] = grad.t().mm(x_rows);
      if (needs_bias) results[kBiases + i] = grad.sum(0);
    }
    if (dx.defined()) results[kX] = dx.view(saved[kX].sizes());
    return results;
  }
};

namespace {

/// Tensors that this cannot serve are left to at::linear: subclasses and modes are given it to interpret.
bool serves_as_one_node(std::initializer_list<OptionalTensor> tensors, const at::Tensor& x) {
  const auto suits = [&](const OptionalTensor& tensor) {
    return !tensor || (is_plain(*tensor) && tensor->scalar_type() == x.scalar_type() &&
                       tensor->device() == x.device() && !has_tangent(*tensor));
  };
  return any_requires_grad(tensors) && !is_function_transform_active() && !is_autocast_on(x) &&
         std::all_of(tensors.begin(), tensors.end(), suits);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> project_query_key_value(const at::Tensor& x, const Projection& query,
                                                                       const Projection& key, const Projection& value) {
  if (!serves_as_one_node({x, query.weight, key.weight, value.weight, query.bias, key.bias, value.bias}, x)) {
    return {at::linear(x, query.weight, query.bias), at::linear(x, key.weight, key.bias),
            at::linear(x, value.weight, value.bias)};
  }
  const variable_list heads =
      QueryKeyValueProjections::apply(x, query.weight, key.weight, value.weight, query.bias, key.bias, value.bias);
  return {heads[0], heads[1], heads[2]};
}

}  // namespace selfattn
