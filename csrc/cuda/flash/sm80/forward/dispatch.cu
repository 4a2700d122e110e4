// Chooses the kernel for a call: the smallest pair of head dimensions that holds the call's. Loads fill the rest with
// zeros.
#include "dispatch.h"

#include "config.h"
#include "flash/find_kernel.h"
#include "launcher.h"

namespace selfattn::cuda::sm80 {

namespace {

struct ForwardKernel {
  int dim_qk, dim_v;
  TileSizes tiles;
  cudaError_t (*launch_bf16)(const ForwardParams&, cudaStream_t);
  cudaError_t (*launch_fp16)(const ForwardParams&, cudaStream_t);
};

template <int kDimQk, int kDimV, bool kHasSoftcap = false, RowLayout kLayout = RowLayout::kAligned>
constexpr ForwardKernel kernel_for() {
  using Tiles = ForwardTiles<kDimQk, kDimV>;
  return {kDimQk,
          kDimV,
          {Tiles::kWarps * Tiles::kWarpRows, Tiles::kTileKey},
          ForwardLauncher<ElementType::kBFloat16, kDimQk, kDimV, kHasSoftcap, kLayout>::launch,
          ForwardLauncher<ElementType::kHalf, kDimQk, kDimV, kHasSoftcap, kLayout>::launch};
}

constexpr int kElementBytes = 2;

// Each is instantiated in instantiations/.
constexpr ForwardKernel kKernels[] = {
    kernel_for<64, 64>(),   kernel_for<96, 96>(),   kernel_for<128, 128>(),
    kernel_for<192, 128>(), kernel_for<192, 192>(), kernel_for<256, 256>(),
};
constexpr ForwardKernel kSoftcapKernels[] = {
    kernel_for<64, 64, true>(),
    kernel_for<128, 128, true>(),
    kernel_for<256, 256, true>(),
};
constexpr ForwardKernel kUnalignedKernels[] = {
    kernel_for<64, 64, false, RowLayout::kUnaligned>(),
    kernel_for<128, 128, false, RowLayout::kUnaligned>(),
    kernel_for<256, 256, false, RowLayout::kUnaligned>(),
};
constexpr ForwardKernel kUnalignedSoftcapKernels[] = {
    kernel_for<64, 64, true, RowLayout::kUnaligned>(),
    kernel_for<128, 128, true, RowLayout::kUnaligned>(),
    kernel_for<256, 256, true, RowLayout::kUnaligned>(),
};

const ForwardKernel* find_kernel(const ForwardParams& params) {
  return params.softcap > 0.f ? find_kernel(kSoftcapKernels, kUnalignedSoftcapKernels, params.shape, kElementBytes)
                              : find_kernel(kKernels, kUnalignedKernels, params.shape, kElementBytes);
}

}  // namespace

TileSizes forward_tiles(const ForwardParams& params) {
  const ForwardKernel* kernel = find_kernel(params);
  return kernel ? kernel->tiles : TileSizes{};
}

cudaError_t launch_forward(const ForwardParams& params, cudaStream_t stream) {
  const ForwardKernel* kernel = find_kernel(params);
  if (!kernel) return cudaErrorInvalidValue;
  return (params.element == ElementType::kBFloat16 ? kernel->launch_bf16 : kernel->launch_fp16)(params, stream);
}

}  // namespace selfattn::cuda::sm80
