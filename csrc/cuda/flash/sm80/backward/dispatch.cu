// Chooses the kernels for a call: the smallest pair of head dimensions that holds the call's. Loads fill the rest with
// zeros.
#include "dispatch.h"

#include "config.h"
#include "flash/find_kernel.h"
#include "launcher.h"

namespace selfattn::cuda::sm80 {
namespace {

struct BackwardKernels {
  int dim_qk, dim_v;
  TileSizes tiles;
  int ordered_queries;
  cudaError_t (*launch_bf16)(const BackwardParams&, cudaStream_t);
  cudaError_t (*launch_fp16)(const BackwardParams&, cudaStream_t);
  int64_t (*workspace_bytes)(const BackwardParams&);
};

template <int kDimQk, int kDimV, bool kHasSoftcap = false, RowLayout kLayout = RowLayout::kAligned>
constexpr BackwardKernels kernels_for() {
  using Rows = BackwardTileRows<kDimQk, kDimV>;
  return {kDimQk,
          kDimV,
          {kQueryBlock, Rows::kOfDkdv},
          Rows::kOfDq,
          BackwardLauncher<ElementType::kBFloat16, kDimQk, kDimV, kHasSoftcap, kLayout>::launch,
          BackwardLauncher<ElementType::kHalf, kDimQk, kDimV, kHasSoftcap, kLayout>::launch,
          BackwardLauncher<ElementType::kHalf, kDimQk, kDimV, kHasSoftcap, kLayout>::workspace_bytes};
}

constexpr int kElementBytes = 2;

// Each is instantiated in instantiations/.
constexpr BackwardKernels kKernels[] = {
    kernels_for<64, 64>(),   kernels_for<96, 96>(),   kernels_for<128, 128>(),
    kernels_for<192, 128>(), kernels_for<192, 192>(), kernels_for<256, 256>(),
};
constexpr BackwardKernels kSoftcapKernels[] = {
    kernels_for<64, 64, true>(),
    kernels_for<128, 128, true>(),
    kernels_for<256, 256, true>(),
};
constexpr BackwardKernels kUnalignedKernels[] = {
    kernels_for<64, 64, false, RowLayout::kUnaligned>(),
    kernels_for<128, 128, false, RowLayout::kUnaligned>(),
    kernels_for<256, 256, false, RowLayout::kUnaligned>(),
};
constexpr BackwardKernels kUnalignedSoftcapKernels[] = {
    kernels_for<64, 64, true, RowLayout::kUnaligned>(),
    kernels_for<128, 128, true, RowLayout::kUnaligned>(),
    kernels_for<256, 256, true, RowLayout::kUnaligned>(),
};

const BackwardKernels* find_kernel(const BackwardParams& params) {
  return params.softcap > 0.f ? find_kernel(kSoftcapKernels, kUnalignedSoftcapKernels, params.shape, kElementBytes)
                              : find_kernel(kKernels, kUnalignedKernels, params.shape, kElementBytes);
}

}  // namespace

TileSizes backward_tiles(const BackwardParams& params) {
  const BackwardKernels* kernels = find_kernel(params);
  return kernels ? kernels->tiles : TileSizes{};
}

int backward_ordered_queries(const BackwardParams& params) {
  const BackwardKernels* kernels = find_kernel(params);
  return kernels ? kernels->ordered_queries : 0;
}

int64_t backward_workspace_bytes(const BackwardParams& params) {
  const BackwardKernels* kernels = find_kernel(params);
  return kernels ? kernels->workspace_bytes(params) : 0;
}

cudaError_t launch_backward(const BackwardParams& params, cudaStream_t stream) {
  const BackwardKernels* kernels = find_kernel(params);
  if (!kernels) return cudaErrorInvalidValue;
  return (params.element == ElementType::kBFloat16 ? kernels->launch_bf16 : kernels->launch_fp16)(params, stream);
}

}  // namespace selfattn::cuda::sm80
