// Autocast casts the tokens of a call to the dtype of the cache that they meet, and never the cache.
#include <ATen/autocast_mode.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

namespace selfattn {
namespace {

/// One of the operators with some of q, k and v, and k_cache.
template <at::DeviceType kDevice>
void cast_to_cache(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  const auto& arguments = op.schema().arguments();
  const auto cache = torch::jit::peek(*stack, *op.schema().argumentIndexWithName("k_cache"), arguments.size());
  for (const char* name : {"q", "k", "v"}) {
    const auto index = op.schema().argumentIndexWithName(name);
    if (!index) continue;
    c10::IValue& argument = torch::jit::peek(*stack, *index, arguments.size());
    argument = at::autocast::cached_cast(cache.toTensor().scalar_type(), argument.toTensor(), kDevice);
  }
  op.callBoxed(stack);
}

template <at::DeviceType kDevice>
void register_casts(torch::Library& m) {
  for (const char* name : {"attention_with_kv_cache", "attention_with_kv_cache_lse", "explain_kv_cache_backend",
                           "append_kv_cache", "qk_norm_rope_append"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<cast_to_cache<kDevice>>());
  }
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, AutocastCPU, m) { selfattn::register_casts<at::kCPU>(m); }
TORCH_LIBRARY_IMPL(selfattn, AutocastCUDA, m) { selfattn::register_casts<at::kCUDA>(m); }
