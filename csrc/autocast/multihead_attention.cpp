// Autocast casts q, k and v to the region's lower precision, never ids or sinks.
#include <ATen/autocast_mode.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

namespace selfattn {
namespace {

/// One of the operators with q, k and v, its first arguments, cast before it.
template <at::DeviceType kDevice>
void cast_query_key_value(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  const auto dtype = at::autocast::get_autocast_dtype(kDevice);
  for (size_t i = 0; i < 3; ++i) {
    c10::IValue& argument = torch::jit::peek(*stack, i, op.schema().arguments().size());
    argument = at::autocast::cached_cast(dtype, argument.toTensor(), kDevice);
  }
  op.callBoxed(stack);
}

template <at::DeviceType kDevice>
void register_casts(torch::Library& m) {
  for (const char* name :
       {"multihead_attention", "multihead_attention_lse", "explain_backend", "context_parallel_attention"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<cast_query_key_value<kDevice>>());
  }
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, AutocastCPU, m) { selfattn::register_casts<at::kCPU>(m); }
TORCH_LIBRARY_IMPL(selfattn, AutocastCUDA, m) { selfattn::register_casts<at::kCUDA>(m); }
