#include "distributed/context_part.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/variable.h>

#include <limits>

#include "attention/flash_attention_op.h"
#include "attention/select_backend.h"
#include "backend/reference.h"

namespace selfattn {
namespace {

using at::Tensor;

/// Autograd as a caller outside of every operator has it.
c10::impl::LocalDispatchKeySet keys_with_autograd() {
  c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  keys.excluded_ = keys.excluded_ - c10::autograd_dispatch_keyset_with_ADInplaceOrView;
  return keys;
}

PartGradients compute_again(AttentionProblem part, const AttentionBackend& backend, const Tensor& grad_out) {
  const c10::impl::ForceDispatchKeyGuard with_autograd(keys_with_autograd());
  const at::AutoGradMode recording(true);
  const auto as_leaf = [](const Tensor& tensor) { return tensor.detach().requires_grad_(true); };
  part.query = as_leaf(part.query), part.key = as_leaf(part.key), part.value = as_leaf(part.value);
  torch::autograd::variable_list inputs = {part.query, part.key, part.value};
  if (part.sinks) inputs.push_back(*(part.sinks = as_leaf(*part.sinks)));
  const Tensor out = std::get<0>(backend.call(part));
  const auto grads = torch::autograd::grad({out}, inputs, {grad_out.detach()});
  return {grads[0], grads[1], grads[2], part.sinks ? grads[3] : Tensor()};
}

/// A query of padding has a sink as its lse, and an out that is another part's: it counts nothing.
Tensor sinks_gradient_of_part(const AttentionProblem& part, AttentionGradients gradients) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  gradients.lse = gradients.lse.masked_fill((*part.query_segment_ids < 0).unsqueeze(1), kInfinity);
  return sinks_gradient(*part.sinks, gradients);
}

}  // namespace

AttentionResults attend_part(const AttentionProblem& part, Backend name) {
  const AttentionBackend& backend = select_backend(name, part);
  auto [out, lse] = backend.call(part);
  if (backend.name != Backend::kFlash) {
    lse = at::zeros({out.size(0), out.size(2), out.size(1)}, out.options().dtype(at::kFloat));
  }
  return {out.contiguous(), lse};
}

PartGradients attend_part_backward(const AttentionProblem& part, Backend name, const AttentionGradients& gradients) {
  const AttentionBackend& backend = select_backend(name, part);
  if (backend.name != Backend::kFlash) return compute_again(part, backend, gradients.grad_out);
  PartGradients result;
  std::tie(result.query, result.key, result.value) = flash_attention_backward(part, gradients);
  if (part.sinks) result.sinks = sinks_gradient_of_part(part, gradients);
  return result;
}

}  // namespace selfattn
