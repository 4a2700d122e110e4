// Host side of one kernel instantiation: params -> schedule, launch.
#pragma once
#include "flash/tile/make_schedule.h"
#include "host/device.h"
#include "kernel.cuh"
#include "launcher.h"

namespace selfattn::cuda::float32 {

constexpr int64_t kMaskedLastSectionBytes = 32 << 20;

template <int kDim, Precision kPrecision, RowLayout kLayout>
cudaError_t ForwardLauncher<kDim, kPrecision, kLayout>::launch(const ForwardParams& params, cudaStream_t stream) {
  using Config = ForwardConfig<kDim, kPrecision, kLayout>;
  const bool is_masked = params.segments.mode || params.window.left < AttentionWindow::kUnbounded ||
                         params.window.right < AttentionWindow::kUnbounded;
  const ForwardKernelParams p{
      params, make_schedule(params.shape, Config::kTileQuery, is_masked, kMaskedLastSectionBytes, sizeof(float))};
  const auto kernel = flash_attention_forward_kernel<Config>;
  int device = 0;
  if (const cudaError_t status = cudaGetDevice(&device)) return status;
  constexpr int kBytes = sizeof(typename Config::SharedStorage);
  if (const cudaError_t status = allow_shared_memory<Config>(kernel, kBytes, device)) return status;
  kernel<<<p.schedule.tiles, Config::kThreads, kBytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace selfattn::cuda::float32
