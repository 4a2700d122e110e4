// Chooses the kernels for a call: those of the smallest head dimension that holds the call's. Loads fill the rest with
// zeros.
#include "dispatch.h"

#include "config.h"
#include "flash/find_kernel.h"
#include "launcher.h"
#include "workspace.h"

namespace selfattn::cuda::float32 {
namespace {

struct BackwardKernels {
  int dim_qk, dim_v;
  int ordered_queries;
  cudaError_t (*launch_ieee)(const BackwardParams&, cudaStream_t);
  cudaError_t (*launch_tf32)(const BackwardParams&, cudaStream_t);
};

template <int kDim, RowLayout kLayout>
constexpr BackwardKernels kernels_for() {
  return {kDim, kDim, BackwardTiles<kDim>::Queries::kOrderedRows,
          BackwardLauncher<kDim, Precision::kIeee, kLayout>::launch,
          BackwardLauncher<kDim, Precision::kTf32, kLayout>::launch};
}

// Each is instantiated in instantiations/.
constexpr BackwardKernels kKernels[] = {kernels_for<64, RowLayout::kAligned>(), kernels_for<128, RowLayout::kAligned>(),
                                        kernels_for<256, RowLayout::kAligned>()};
constexpr BackwardKernels kUnalignedKernels[] = {kernels_for<64, RowLayout::kUnaligned>(),
                                                 kernels_for<128, RowLayout::kUnaligned>(),
                                                 kernels_for<256, RowLayout::kUnaligned>()};

const BackwardKernels* find_kernel(const AttentionShape& shape) {
  return find_kernel(kKernels, kUnalignedKernels, shape, sizeof(float));
}

}  // namespace

TileSizes backward_tiles(const BackwardParams&) { return {kTableBlock, kTableBlock}; }

int backward_ordered_queries(const BackwardParams& params) {
  const BackwardKernels* kernels = find_kernel(params.shape);
  return kernels ? kernels->ordered_queries : 0;
}

int64_t backward_workspace_bytes(const BackwardParams& params) {
  return 2 * int64_t(sizeof(float)) * stat_count(params.shape);
}

cudaError_t launch_backward(const BackwardParams& params, cudaStream_t stream) {
  const BackwardKernels* kernels = find_kernel(params.shape);
  if (!kernels) return cudaErrorInvalidValue;
  return (params.allows_tf32 ? kernels->launch_tf32 : kernels->launch_ieee)(params, stream);
}

}  // namespace selfattn::cuda::float32
