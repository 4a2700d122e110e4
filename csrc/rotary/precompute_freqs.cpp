// precompute_freqs: the tables of the rotary embedding.
#include <torch/library.h>

#include "rotary/rotary.h"

namespace selfattn {
namespace {

std::tuple<at::Tensor, at::Tensor> make_freqs(int64_t feat_dim, const OptionalTensor& pos_idx,
                                              std::optional<int64_t> max_length, double theta,
                                              std::optional<at::ScalarType> dtype, std::optional<at::Device> device) {
  check_rotary_dim(feat_dim, "feat_dim");
  check_theta(theta, "theta");
  const at::Tensor positions = table_positions(
      feat_dim, pos_idx, "pos_idx", max_length ? std::optional<c10::SymInt>(*max_length) : std::nullopt, dtype, device);
  const RotaryTables tables = rotary_tables(positions, feat_dim, theta);
  return {tables.sin.to(dtype.value_or(at::kFloat)), tables.cos.to(dtype.value_or(at::kFloat))};
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, CompositeImplicitAutograd, m) {
  using namespace selfattn;
  m.impl("precompute_freqs", TORCH_FN(make_freqs));
}
