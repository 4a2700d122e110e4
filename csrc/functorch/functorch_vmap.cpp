#include <ATen/functorch/BatchedTensorImpl.h>

#include "common/function_transform.h"
#include "functorch/vmap.h"

namespace selfattn {

FunctorchVmap::FunctorchVmap(const std::vector<OptionalTensor>& tensors) : level_(current_transform_level()) {
  for (const OptionalTensor& tensor : tensors) {
    if (!maps(tensor)) continue;
    const auto* batched = at::functorch::unsafeGetBatchedImpl(*tensor);
    size_ = batched->value().sym_size(batched->bdim());
    return;
  }
}

bool FunctorchVmap::maps(const OptionalTensor& tensor) const {
  if (!tensor || !tensor->defined()) return false;
  const auto* batched = at::functorch::maybeGetBatchedImpl(*tensor);
  return batched != nullptr && batched->level() == level_;
}

at::Tensor FunctorchVmap::take_out(const at::Tensor& tensor) const {
  if (!maps(tensor)) return stand_for_all(tensor);
  const auto* batched = at::functorch::unsafeGetBatchedImpl(tensor);
  return batched->value().movedim(batched->bdim(), 0);
}

at::Tensor FunctorchVmap::put_in(const at::Tensor& tensor) const {
  return at::functorch::makeBatched(tensor, /*dim=*/0, level_);
}

}  // namespace selfattn
