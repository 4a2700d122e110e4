// Chooses the kernel for a call: that of the smallest head dimension that holds the call's. Loads fill the rest with
// zeros.
#include "dispatch.h"

#include "config.h"
#include "flash/find_kernel.h"
#include "launcher.h"

namespace selfattn::cuda::float32 {
namespace {

struct ForwardKernel {
  int dim_qk, dim_v;
  TileSizes tiles;
  cudaError_t (*launch_ieee)(const ForwardParams&, cudaStream_t);
  cudaError_t (*launch_tf32)(const ForwardParams&, cudaStream_t);
};

template <int kDim, RowLayout kLayout>
constexpr ForwardKernel kernel_for() {
  using Tiles = ForwardTiles<kDim, Precision::kIeee>;
  using Tf32Tiles = ForwardTiles<kDim, Precision::kTf32>;
  static_assert(Tiles::kTileQuery == Tf32Tiles::kTileQuery && Tiles::kTileKey == Tf32Tiles::kTileKey);
  return {kDim,
          kDim,
          {Tiles::kTileQuery, Tiles::kTileKey},
          ForwardLauncher<kDim, Precision::kIeee, kLayout>::launch,
          ForwardLauncher<kDim, Precision::kTf32, kLayout>::launch};
}

// Each is instantiated in instantiations/.
constexpr ForwardKernel kKernels[] = {kernel_for<64, RowLayout::kAligned>(), kernel_for<128, RowLayout::kAligned>(),
                                      kernel_for<256, RowLayout::kAligned>()};
constexpr ForwardKernel kUnalignedKernels[] = {kernel_for<64, RowLayout::kUnaligned>(),
                                               kernel_for<128, RowLayout::kUnaligned>(),
                                               kernel_for<256, RowLayout::kUnaligned>()};

const ForwardKernel* find_kernel(const AttentionShape& shape) {
  return find_kernel(kKernels, kUnalignedKernels, shape, sizeof(float));
}

}  // namespace

TileSizes forward_tiles(const ForwardParams& params) {
  const ForwardKernel* kernel = find_kernel(params.shape);
  return kernel ? kernel->tiles : TileSizes{};
}

cudaError_t launch_forward(const ForwardParams& params, cudaStream_t stream) {
  const ForwardKernel* kernel = find_kernel(params.shape);
  if (!kernel) return cudaErrorInvalidValue;
  return (params.allows_tf32 ? kernel->launch_tf32 : kernel->launch_ieee)(params, stream);
}

}  // namespace selfattn::cuda::float32
