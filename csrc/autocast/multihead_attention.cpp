// Autocast casts q, k and v to the region's lower precision, never ids or sinks.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "common/optional_tensor.h"

namespace selfattn {
namespace {

template <at::DeviceType kDevice>
constexpr c10::DispatchKey kAutocastKey =
    kDevice == at::kCUDA ? c10::DispatchKey::AutocastCUDA : c10::DispatchKey::AutocastCPU;

/// An operator of the schema of multihead_attention with q, k and v cast before it.
template <at::DeviceType kDevice, typename Result, const char* kName>
Result cast_query_key_value(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const OptionalTensor& segment_ids, bool causal, std::optional<double> qk_scale,
                            c10::string_view backend, const OptionalTensor& kv_segment_ids, int64_t window_left,
                            int64_t window_right, double softcap, const OptionalTensor& sinks) {
  using Schema = Result(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&, bool,
                        std::optional<double>, c10::string_view, const OptionalTensor&, int64_t, int64_t, double,
                        const OptionalTensor&);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(kName, "").template typed<Schema>();
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(kAutocastKey<kDevice>);
  const auto dtype = at::autocast::get_autocast_dtype(kDevice);
  const auto cast = [&](const at::Tensor& tensor) { return at::autocast::cached_cast(dtype, tensor, kDevice); };
  return op.call(cast(q), cast(k), cast(v), segment_ids, causal, qk_scale, backend, kv_segment_ids, window_left,
                 window_right, softcap, sinks);
}

constexpr char kAttention[] = "selfattn::multihead_attention";
constexpr char kAttentionLse[] = "selfattn::multihead_attention_lse";
constexpr char kExplain[] = "selfattn::explain_backend";

template <at::DeviceType kDevice>
void register_casts(torch::Library& m) {
  m.impl("multihead_attention", TORCH_FN((cast_query_key_value<kDevice, at::Tensor, kAttention>)));
  m.impl("multihead_attention_lse",
         TORCH_FN((cast_query_key_value<kDevice, std::tuple<at::Tensor, at::Tensor>, kAttentionLse>)));
  m.impl("explain_backend", TORCH_FN((cast_query_key_value<kDevice, std::string, kExplain>)));
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, AutocastCPU, m) { selfattn::register_casts<at::kCPU>(m); }
TORCH_LIBRARY_IMPL(selfattn, AutocastCUDA, m) { selfattn::register_casts<at::kCUDA>(m); }
