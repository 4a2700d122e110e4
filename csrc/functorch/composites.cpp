// vmap of the operators that call others: as they are, their parts have rules. Without this, PyTorch calls them once
// for each element of the map.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "common/composite_operators.h"

namespace selfattn {
namespace {

/// vmap comes before autocast, whose casts, where the operator has any, come before its parts.
void call_parts(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const c10::DispatchKeySet autocast = keys & c10::autocast_dispatch_keyset;
  const c10::DispatchKey cast = autocast.highestPriorityTypeId();
  const bool has_cast = !autocast.empty() && op.hasKernelForDispatchKey(cast);
  op.callBoxedForDispatchKey(has_cast ? cast : c10::DispatchKey::CompositeImplicitAutograd, *stack);
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, FuncTorchBatched, m) {
  for (const char* name : selfattn::kCompositeOperators) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<selfattn::call_parts>());
  }
}
