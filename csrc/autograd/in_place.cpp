// The operators that write into their arguments are not differentiable: where a gradient is wanted they say so, and
// they let autograd know that the memory has changed.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace selfattn {
namespace {

bool is_written(const c10::Argument& argument) { return argument.alias_info() && argument.alias_info()->isWrite(); }

void write_without_gradient(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  std::vector<at::Tensor> written;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const c10::IValue& value = torch::jit::peek(*stack, i, arguments.size());
    if (!value.isTensor() || !value.toTensor().defined()) continue;
    const at::Tensor& tensor = value.toTensor();
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled() || !tensor.requires_grad(),
                                "selfattn: ", arguments[i].name(), " must not require a gradient, since ",
                                c10::toString(op.schema().operator_name()), " is not differentiable; call ",
                                op.schema().overload_name().empty() ? "it" : op.schema().name() + ", or this one",
                                " under torch.no_grad()");
    if (is_written(arguments[i])) written.push_back(tensor);
  }
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    op.callBoxed(stack);
  }
  for (const at::Tensor& tensor : written) {
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();  // those have no version
  }
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, Autograd, m) {
  for (const char* name :
       {"flash_attention_backward.into", "qk_norm_rope_backward.in_place", "append_kv_cache", "qk_norm_rope_append"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&selfattn::write_without_gradient>());
  }
}
