// Host side of one kernel instantiation: params -> schedule, launch.
#pragma once
#include "flash/tile/element.h"
#include "flash/tile/make_schedule.h"
#include "host/device.h"
#include "kernel.cuh"
#include "launcher.h"

namespace selfattn::cuda::sm80 {

template <class Config>
cudaError_t launch_forward_kernel(const ForwardParams& params, cudaStream_t stream) {
  constexpr int64_t kLastSectionBytes = 64 << 20;
  const ForwardKernelParams p{
      params, make_schedule(params.shape, Config::kTileQuery, Config::kMask != MaskKind::kFull, kLastSectionBytes),
      Softcap::of(params.scale, params.softcap)};
  const auto kernel = flash_attention_forward_kernel<Config>;
  int device = 0;
  if (const cudaError_t status = cudaGetDevice(&device)) return status;
  constexpr int kBytes = sizeof(typename Config::SharedStorage);
  if (const cudaError_t status = allow_shared_memory<Config>(kernel, kBytes, device)) return status;
  kernel<<<p.schedule.tiles, Config::kThreads, kBytes, stream>>>(p);
  return cudaGetLastError();
}

// With softcap, and of unaligned rows, one kernel serves every mask.
template <ElementType kElement, int kDimQk, int kDimV, bool kHasSoftcap, RowLayout kLayout>
cudaError_t ForwardLauncher<kElement, kDimQk, kDimV, kHasSoftcap, kLayout>::launch(const ForwardParams& params,
                                                                                   cudaStream_t stream) {
  using Element = typename ElementOf<kElement>::Type;
  constexpr bool kIsOneForAll = kHasSoftcap || kLayout == RowLayout::kUnaligned;
  if (kIsOneForAll || params.segments.mode || params.window.left < AttentionWindow::kUnbounded) {
    using Config = ForwardConfig<Element, kDimQk, kDimV, MaskKind::kMasked, kHasSoftcap, kLayout>;
    return launch_forward_kernel<Config>(params, stream);
  }
  if constexpr (!kIsOneForAll) {
    if (params.window.right < AttentionWindow::kUnbounded)
      return launch_forward_kernel<ForwardConfig<Element, kDimQk, kDimV, MaskKind::kCausal>>(params, stream);
    return launch_forward_kernel<ForwardConfig<Element, kDimQk, kDimV, MaskKind::kFull>>(params, stream);
  }
}

}  // namespace selfattn::cuda::sm80
