// Chooses the kernel for a call: the smallest pair of head dimensions that holds the call's. Loads fill the rest with
// zeros.
#include "config.h"
#include "flash/params.h"

namespace selfattn::cuda {

// One file each in instantiations/.
cudaError_t launch_forward_64_bf16(const ForwardParams& params, cudaStream_t stream);
cudaError_t launch_forward_64_fp16(const ForwardParams& params, cudaStream_t stream);
cudaError_t launch_forward_96_bf16(const ForwardParams& params, cudaStream_t stream);
cudaError_t launch_forward_96_fp16(const ForwardParams& params, cudaStream_t stream);
cudaError_t launch_forward_128_bf16(const ForwardParams& params, cudaStream_t stream);
cudaError_t launch_forward_128_fp16(const ForwardParams& params, cudaStream_t stream);
cudaError_t launch_forward_192_128_bf16(const ForwardParams& params, cudaStream_t stream);
cudaError_t launch_forward_192_128_fp16(const ForwardParams& params, cudaStream_t stream);
cudaError_t launch_forward_192_bf16(const ForwardParams& params, cudaStream_t stream);
cudaError_t launch_forward_192_fp16(const ForwardParams& params, cudaStream_t stream);
cudaError_t launch_forward_256_bf16(const ForwardParams& params, cudaStream_t stream);
cudaError_t launch_forward_256_fp16(const ForwardParams& params, cudaStream_t stream);

namespace {

using Launcher = cudaError_t (*)(const ForwardParams&, cudaStream_t);

struct ForwardKernel {
  int dim_qk, dim_v;
  TileSizes tiles;
  Launcher launch_bf16, launch_fp16;
};

template <int kDimQk, int kDimV>
constexpr TileSizes tiles_of() {
  using Tiles = ForwardTiles<kDimQk, kDimV>;
  return {Tiles::kWarpgroups * kWarpgroupRows, Tiles::kTileKey};
}

constexpr ForwardKernel kKernels[] = {
    {64, 64, tiles_of<64, 64>(), launch_forward_64_bf16, launch_forward_64_fp16},
    {96, 96, tiles_of<96, 96>(), launch_forward_96_bf16, launch_forward_96_fp16},
    {128, 128, tiles_of<128, 128>(), launch_forward_128_bf16, launch_forward_128_fp16},
    {192, 128, tiles_of<192, 128>(), launch_forward_192_128_bf16, launch_forward_192_128_fp16},
    {192, 192, tiles_of<192, 192>(), launch_forward_192_bf16, launch_forward_192_fp16},
    {256, 256, tiles_of<256, 256>(), launch_forward_256_bf16, launch_forward_256_fp16},
};

const ForwardKernel* find_kernel(const AttentionShape& shape) {
  for (const ForwardKernel& kernel : kKernels) {
    if (shape.dim_qk <= kernel.dim_qk && shape.dim_v <= kernel.dim_v) return &kernel;
  }
  return nullptr;
}

}  // namespace

TileSizes flash_attention_forward_tiles(const AttentionShape& shape) {
  const ForwardKernel* kernel = find_kernel(shape);
  return kernel ? kernel->tiles : TileSizes{};
}

cudaError_t launch_flash_attention_forward(const ForwardParams& params, cudaStream_t stream) {
  const ForwardKernel* kernel = find_kernel(params.shape);
  if (!kernel) return cudaErrorInvalidValue;
  return (params.element == ElementType::kBFloat16 ? kernel->launch_bf16 : kernel->launch_fp16)(params, stream);
}

}  // namespace selfattn::cuda
