// precompute_freqs: the tables of the rotary embedding.
#include <ATen/ops/arange.h>
#include <torch/library.h>

#include "rotary/rotary.h"

namespace selfattn {
namespace {

// Far beyond any model; without limits a slip of the caller's would ask for all memory.
constexpr int64_t kMostFeatures = int64_t{1} << 20, kMostElements = int64_t{1} << 30;

std::tuple<at::Tensor, at::Tensor> precompute_freqs(int64_t feat_dim, const OptionalTensor& pos_idx,
                                                    std::optional<int64_t> max_length, double theta,
                                                    std::optional<at::ScalarType> dtype,
                                                    std::optional<at::Device> device) {
  TORCH_CHECK_VALUE(feat_dim > 0 && feat_dim % 2 == 0, "selfattn: feat_dim must be positive and even; got ", feat_dim);
  TORCH_CHECK_VALUE(feat_dim <= kMostFeatures, "selfattn: feat_dim must be at most ", kMostFeatures, "; got ",
                    feat_dim);
  check_theta(theta, "theta");
  TORCH_CHECK_VALUE(pos_idx.has_value() != max_length.has_value(),
                    "selfattn: exactly one of pos_idx and max_length must be given; got ",
                    pos_idx.has_value() ? "both" : "neither");
  TORCH_CHECK_TYPE(!dtype || at::isFloatingType(*dtype), "selfattn: dtype must be floating point; got ", *dtype);
  at::Tensor positions;
  if (pos_idx) {
    check_positions_dtype(*pos_idx, "pos_idx");
    TORCH_CHECK_VALUE(pos_idx->dim() == 1 || pos_idx->dim() == 2,
                      "selfattn: pos_idx must have the shape (S,) or (B, S); got ", pos_idx->sym_sizes());
    TORCH_CHECK_TYPE(!device || !pos_idx->is_meta() || device->is_meta(),
                     "selfattn: pos_idx must hold values for tables on device ", *device, "; got a tensor on meta");
    positions = device ? pos_idx->to(*device) : *pos_idx;
  } else {
    TORCH_CHECK_VALUE(*max_length >= 0, "selfattn: max_length must be at least 0; got ", *max_length);
    TORCH_CHECK_VALUE(*max_length <= kMostElements / (feat_dim / 2), "selfattn: max_length must be at most ",
                      kMostElements / (feat_dim / 2), " for tables of ", kMostElements, " elements; got ", *max_length);
    positions = at::arange(*max_length, at::TensorOptions().dtype(at::kLong).device(device.value_or(at::kCPU)));
  }
  const RotaryTables tables = rotary_tables(positions, feat_dim, theta);
  return {tables.sin.to(dtype.value_or(at::kFloat)), tables.cos.to(dtype.value_or(at::kFloat))};
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, CompositeImplicitAutograd, m) {
  m.impl("precompute_freqs", TORCH_FN(selfattn::precompute_freqs));
}
