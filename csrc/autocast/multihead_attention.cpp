// Autocast casts q, k and v to the region's lower precision, never ids or sinks.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "attention/multihead_attention.h"

namespace selfattn {
namespace {

template <at::DeviceType kDevice>
constexpr c10::DispatchKey kAutocastKey =
    kDevice == at::kCUDA ? c10::DispatchKey::AutocastCUDA : c10::DispatchKey::AutocastCPU;

/// One of the operators with q, k and v cast before it.
template <at::DeviceType kDevice, typename Result, const char* kName>
Result cast_query_key_value(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const AttentionArguments& arguments, c10::string_view backend) {
  static const MultiheadOp<Result> op(kName);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(kAutocastKey<kDevice>);
  const auto dtype = at::autocast::get_autocast_dtype(kDevice);
  const auto cast = [&](const at::Tensor& tensor) { return at::autocast::cached_cast(dtype, tensor, kDevice); };
  return op(cast(q), cast(k), cast(v), arguments, backend);
}

template <at::DeviceType kDevice, typename Result, const char* kName>
void register_cast(torch::Library& m) {
  m.impl(kName, TORCH_FN((multihead_from_schema<Result, cast_query_key_value<kDevice, Result, kName>>)));
}

constexpr char kAttention[] = "selfattn::multihead_attention";
constexpr char kAttentionLse[] = "selfattn::multihead_attention_lse";
constexpr char kExplain[] = "selfattn::explain_backend";

template <at::DeviceType kDevice>
void register_casts(torch::Library& m) {
  register_cast<kDevice, at::Tensor, kAttention>(m);
  register_cast<kDevice, std::tuple<at::Tensor, at::Tensor>, kAttentionLse>(m);
  register_cast<kDevice, std::string, kExplain>(m);
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, AutocastCPU, m) { selfattn::register_casts<at::kCPU>(m); }
TORCH_LIBRARY_IMPL(selfattn, AutocastCUDA, m) { selfattn::register_casts<at::kCUDA>(m); }
