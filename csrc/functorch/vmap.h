#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/stack.h>
#include <c10/core/SymInt.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/optional_tensor.h"

namespace selfattn {

/// The map of one operator call whose tensors are batched: takes the mapped dimension out of them and puts it into
/// results. PyTorch has two kinds of batched tensors, with a dispatch key each: those of torch.func.vmap, which sees
/// one level at a time, and those of torch.autograd.grad(is_grads_batched=True), which hold every level.
///
/// Notation: M elements of the map, B batch. A tensor that is not mapped stands for M equal ones.
class Vmap {
 public:
  virtual ~Vmap() = default;

  /// M; only where a tensor of the call is mapped.
  const c10::SymInt& size() const { return *size_; }
  /// Whether any tensor of the call is mapped: torch.func.vmap asks for a rule where one is so at another level too.
  bool has_mapped() const { return size_.has_value(); }
  virtual bool maps(const OptionalTensor& tensor) const = 0;
  /// The key of the batched tensors: what a rule calls with tensors taken out of the map must not come back to it.
  virtual c10::DispatchKey key() const = 0;

  /// (...) -> (M, ...).
  virtual at::Tensor take_out(const at::Tensor& tensor) const = 0;
  /// The opposite: (M, ...) -> (...), mapped.
  virtual at::Tensor put_in(const at::Tensor& tensor) const = 0;

  /// (B, ...) -> (M * B, ...): the map as part of the batch. Nothing stays nothing.
  at::Tensor fold(const at::Tensor& tensor) const;
  OptionalTensor fold(const OptionalTensor& tensor) const;
  /// The opposite: (M * B, ...) -> (B, ...), mapped.
  at::Tensor unfold(const at::Tensor& tensor, const c10::SymInt& batch) const;
  /// The same for (1 or B, ...), which stands for B rows where it has one: it stays one where it is not mapped.
  OptionalTensor fold_rows(const OptionalTensor& tensor, const c10::SymInt& batch) const;

  /// Element `index` of the map; a tensor that is not mapped is the same in each.
  at::Tensor element(const at::Tensor& tensor, int64_t index) const;
  OptionalTensor element(const OptionalTensor& tensor, int64_t index) const;

 protected:
  /// A tensor that is not mapped, for all: (...) -> (M, ...), expanded.
  at::Tensor stand_for_all(const at::Tensor& tensor) const;

  std::optional<c10::SymInt> size_;
};

/// Calls `function` with the index of each element of the map and stacks the tuples of tensors that it returns, mapped:
/// for what has no batch to fold the map into. M is at least 1.
template <typename Function>
auto call_one_by_one(const Vmap& vmap, const Function& function) {
  using Results = std::invoke_result_t<Function, int64_t>;
  std::vector<std::vector<at::Tensor>> results(std::tuple_size_v<Results>);
  const int64_t count = vmap.size().guard_int(__FILE__, __LINE__);
  for (int64_t i = 0; i < count; ++i) {
    std::apply(
        [&](auto&&... tensors) {
          size_t place = 0;
          (results[place++].push_back(std::move(tensors)), ...);
        },
        function(i));
  }
  size_t place = 0;
  const auto next = [&] { return vmap.put_in(at::stack(results[place++])); };
  return std::apply([&](const auto&... tensors) { return Results{((void)tensors, next())...}; }, Results{});
}

/// Element `index` of the map of a whole call, of a type with for_each_tensor.
template <typename Call>
Call element_of_call(const Vmap& vmap, Call call, int64_t index) {
  call.for_each_tensor([&](auto& tensor) { tensor = vmap.element(tensor, index); });
  return call;
}

/// All tensors of a call, and others.
template <typename Call, typename... Others>
std::vector<OptionalTensor> tensors_of(Call call, const Others&... others) {
  std::vector<OptionalTensor> tensors{others...};
  call.for_each_tensor([&](const auto& tensor) { tensors.push_back(tensor); });
  return tensors;
}

/// Of torch.func.vmap: tensors of the key FuncTorchBatched, at the level of the innermost transform.
class FunctorchVmap final : public Vmap {
 public:
  explicit FunctorchVmap(const std::vector<OptionalTensor>& tensors);
  bool maps(const OptionalTensor& tensor) const override;
  c10::DispatchKey key() const override { return c10::DispatchKey::FuncTorchBatched; }
  at::Tensor take_out(const at::Tensor& tensor) const override;
  at::Tensor put_in(const at::Tensor& tensor) const override;

 private:
  int64_t level_;
};

/// Of is_grads_batched: tensors of the key Batched. M counts the elements of every level together.
class BatchedGradientsVmap final : public Vmap {
 public:
  explicit BatchedGradientsVmap(const std::vector<OptionalTensor>& tensors);
  bool maps(const OptionalTensor& tensor) const override;
  c10::DispatchKey key() const override { return c10::DispatchKey::Batched; }
  at::Tensor take_out(const at::Tensor& tensor) const override;
  at::Tensor put_in(const at::Tensor& tensor) const override;

 private:
  std::vector<int64_t> levels_;     // increasing
  std::vector<c10::SymInt> sizes_;  // of each level
};

}  // namespace selfattn
