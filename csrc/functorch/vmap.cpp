#include "functorch/vmap.h"

namespace selfattn {

at::Tensor Vmap::stand_for_all(const at::Tensor& tensor) const {
  std::vector<c10::SymInt> sizes{size()};
  sizes.insert(sizes.end(), tensor.sym_sizes().begin(), tensor.sym_sizes().end());
  return tensor.unsqueeze(0).expand_symint(sizes);
}

at::Tensor Vmap::fold(const at::Tensor& tensor) const {
  return tensor.defined() ? take_out(tensor).flatten(0, 1) : tensor;
}

OptionalTensor Vmap::fold(const OptionalTensor& tensor) const {
  return tensor ? OptionalTensor(fold(*tensor)) : std::nullopt;
}

at::Tensor Vmap::unfold(const at::Tensor& tensor, const c10::SymInt& batch) const {
  return put_in(tensor.unflatten_symint(0, {size(), batch}));
}

OptionalTensor Vmap::fold_rows(const OptionalTensor& tensor, const c10::SymInt& batch) const {
  if (!tensor || (!maps(tensor) && tensor->sym_size(0) == 1)) return tensor;
  at::Tensor rows = take_out(*tensor);  // (M, 1 or B, ...)
  std::vector<c10::SymInt> sizes = rows.sym_sizes().vec();
  sizes[1] = batch;
  return rows.expand_symint(sizes).flatten(0, 1);
}

at::Tensor Vmap::element(const at::Tensor& tensor, int64_t index) const {
  return tensor.defined() && maps(tensor) ? take_out(tensor).select(0, index) : tensor;
}

OptionalTensor Vmap::element(const OptionalTensor& tensor, int64_t index) const {
  return tensor ? OptionalTensor(element(*tensor, index)) : std::nullopt;
}

}  // namespace selfattn
