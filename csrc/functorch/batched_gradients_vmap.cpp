#include <ATen/LegacyBatchedTensorImpl.h>

#include <functional>
#include <map>
#include <numeric>

#include "functorch/vmap.h"

namespace selfattn {

BatchedGradientsVmap::BatchedGradientsVmap(const std::vector<OptionalTensor>& tensors) {
  std::map<int64_t, c10::SymInt> size_of_level;
  for (const OptionalTensor& tensor : tensors) {
    if (!maps(tensor)) continue;
    const auto* batched = at::unsafeGetBatchedImpl(*tensor);
    for (const at::BatchDim& dim : batched->bdims()) {
      size_of_level[dim.level()] = batched->value().sym_size(dim.dim());
    }
  }
  for (const auto& [level, size] : size_of_level) {
    levels_.push_back(level);
    sizes_.push_back(size);
  }
  if (!sizes_.empty()) size_ = std::accumulate(sizes_.begin(), sizes_.end(), c10::SymInt(1), std::multiplies<>());
}

bool BatchedGradientsVmap::maps(const OptionalTensor& tensor) const {
  return tensor && tensor->defined() && at::isBatchedTensor(*tensor);
}

at::Tensor BatchedGradientsVmap::take_out(const at::Tensor& tensor) const {
  if (!maps(tensor)) return stand_for_all(tensor);
  const auto* batched = at::unsafeGetBatchedImpl(tensor);
  std::vector<int64_t> dims, places;
  for (const at::BatchDim& dim : batched->bdims()) {  // by increasing level
    places.push_back(static_cast<int64_t>(places.size()));
    dims.push_back(dim.dim());
  }
  at::Tensor values = batched->value().movedim(dims, places);
  std::vector<c10::SymInt> sizes = sizes_;
  sizes.insert(sizes.end(), tensor.sym_sizes().begin(), tensor.sym_sizes().end());
  for (size_t i = 0, next = 0; i < levels_.size(); ++i) {  // a level that it lacks is expanded
    if (next < dims.size() && batched->bdims()[next].level() == levels_[i]) {
      ++next;
    } else {
      values = values.unsqueeze(static_cast<int64_t>(i));
    }
  }
  return values.expand_symint(sizes).flatten(0, static_cast<int64_t>(levels_.size()) - 1);
}

at::Tensor BatchedGradientsVmap::put_in(const at::Tensor& tensor) const {
  at::BatchDims dims;
  for (size_t i = 0; i < levels_.size(); ++i) dims.emplace_back(levels_[i], static_cast<int64_t>(i));
  return at::makeBatched(tensor.unflatten_symint(0, sizes_), std::move(dims));
}

}  // namespace selfattn
