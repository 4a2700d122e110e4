// Picks the kernel set of a call: the narrowest one that holds its head dimensions. Columns past them are zeros.
#include "dispatch.h"

#include <algorithm>

#include "config.cuh"
#include "launcher.h"

namespace selfattn::cuda::sm90 {
namespace {

template <int kHeadDim_>
struct HeadDim {
  static constexpr int kHeadDim = kHeadDim_;
};

template <class Visitor>
auto visit_head_dim(const AttentionShape& shape, Visitor&& visitor) {
  const int dim = std::max(shape.dim_qk, shape.dim_v);
  if (dim <= 64) return visitor(HeadDim<64>{});
  if (dim <= 128) return visitor(HeadDim<128>{});
  return visitor(HeadDim<256>{});
}

template <class Visitor>
auto visit_launcher(const BackwardParams& params, Visitor&& visitor) {
  return visit_head_dim(params.shape, [&](auto dim) {
    constexpr int kHeadDim = decltype(dim)::kHeadDim;
    const bool is_bf16 = params.element == ElementType::kBFloat16;
    if (params.softcap > 0.f) {
      if (is_bf16) return visitor(BackwardLauncher<ElementType::kBFloat16, kHeadDim, true>{});
      return visitor(BackwardLauncher<ElementType::kHalf, kHeadDim, true>{});
    }
    if (is_bf16) return visitor(BackwardLauncher<ElementType::kBFloat16, kHeadDim>{});
    return visitor(BackwardLauncher<ElementType::kHalf, kHeadDim>{});
  });
}

}  // namespace

TileSizes backward_tiles(const BackwardParams& params) {
  return visit_head_dim(params.shape, [](auto dim) {
    using Config = BackwardConfig<void, decltype(dim)::kHeadDim>;
    return TileSizes{kQueryBlock, Config::kTileKv};
  });
}

int backward_ordered_queries(const BackwardParams& params) {
  return visit_head_dim(
      params.shape, [](auto dim) { return BackwardConfig<void, decltype(dim)::kHeadDim>::kIsD256 ? 0 : kStatTile; });
}

int64_t backward_workspace_bytes(const BackwardParams& params) {
  return visit_launcher(params, [&](auto launcher) { return launcher.workspace_bytes(params); });
}

cudaError_t launch_backward(const BackwardParams& params, cudaStream_t stream) {
  return visit_launcher(params, [&](auto launcher) { return launcher.launch(params, stream); });
}

}  // namespace selfattn::cuda::sm90
