#include "common/function_transform.h"

#include <ATen/FuncTorchTLS.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <ATen/functorch/DynamicLayer.h>
#include <c10/util/Exception.h>

#include <algorithm>

namespace selfattn {
namespace {

using at::functorch::DynamicLayer;

constexpr c10::DispatchKeySet kKeysOfWrappers({c10::DispatchKey::FuncTorchBatched,
                                               c10::DispatchKey::BatchedNestedTensor, c10::DispatchKey::Batched,
                                               c10::DispatchKey::FuncTorchGradWrapper});

/// The active transforms, outermost first.
c10::ArrayRef<DynamicLayer> active_transforms() {
  // A thread that never met a transform has no stack of them, and asking for it would make one.
  return at::functorch::functorchTLSAccessor() ? at::functorch::getDynamicLayerStack() : c10::ArrayRef<DynamicLayer>();
}

}  // namespace

bool is_function_transform_active() { return !active_transforms().empty(); }

bool is_differentiation_transform_active() {
  const auto transforms = active_transforms();
  return std::any_of(transforms.begin(), transforms.end(), [](const DynamicLayer& transform) {
    return transform.key() != at::functorch::TransformType::Vmap;
  });
}

int64_t current_transform_level() {
  const auto transforms = active_transforms();
  TORCH_INTERNAL_ASSERT(!transforms.empty(), "no transform is active");
  return transforms.back().layerId();
}

bool is_wrapped_by_transform(const at::Tensor& tensor) {
  return tensor.defined() && tensor.key_set().has_any(kKeysOfWrappers);
}

at::Tensor without_maps(const at::Tensor& tensor) {
  at::Tensor values = tensor;
  while (const auto* batched = at::functorch::maybeGetBatchedImpl(values)) values = at::Tensor(batched->value());
  return values;
}

bool has_tangent(const at::Tensor& tensor) { return tensor.defined() && tensor._fw_grad(0).defined(); }

}  // namespace selfattn
