// Host side of one kernel instantiation: params -> schedule, launch.
#pragma once
#include <algorithm>

#include "flash/tile/element.h"
#include "flash/tile/make_schedule.h"
#include "host/device.h"
#include "kernel.cuh"
#include "launcher.h"

namespace selfattn::cuda::sm80 {

template <class Config>
cudaError_t launch_forward_kernel(const ForwardParams& params, int device, cudaStream_t stream) {
  constexpr int64_t kLastSectionBytes = 64 << 20;
  const ForwardKernelParams p{
      params, make_schedule(params.shape, Config::kTileQuery, Config::kMask != MaskKind::kFull, kLastSectionBytes),
      SoftcapExponent::of(params.scale, params.softcap)};
  const auto kernel = flash_attention_forward_kernel<Config>;
  constexpr int kBytes = sizeof(typename Config::SharedStorage);
  if (const cudaError_t status = allow_shared_memory<Config>(kernel, kBytes, device)) return status;
  kernel<<<p.schedule.tiles, Config::kThreads, kBytes, stream>>>(p);
  return cudaGetLastError();
}

// Of K and V, where both kernels are there: two, unless an SM holds more thread blocks with one. most_bytes: what a
// thread block may have on the card. An SM has 1 KB more than that, and each of its thread blocks costs it 1 KB.
template <class Tiles>
int buffers_for(int bytes_of_one, int bytes_of_two, int most_bytes) {
  constexpr int kOwnBytes = 1024;
  const auto blocks = [&](int bytes) {
    return std::min((most_bytes + kOwnBytes) / (bytes + kOwnBytes), Tiles::kBlocksAtOnce);
  };
  return blocks(bytes_of_two) < blocks(bytes_of_one) ? 1 : 2;
}

template <class Element, int kDimQk, int kDimV, MaskKind kMask, bool kReadsPages = false>
cudaError_t launch_with_buffers(const ForwardParams& params, int device, cudaStream_t stream) {
  using Tiles = ForwardTiles<kDimQk, kDimV>;
  constexpr RowLayout kLayout = RowLayout::kAligned;
  using WithOne = ForwardConfig<Element, kDimQk, kDimV, kMask, 1, /*kHasSoftcap=*/false, kLayout, kReadsPages>;
  if constexpr (Tiles::kMostBuffers == 2) {
    using WithTwo = ForwardConfig<Element, kDimQk, kDimV, kMask, 2, /*kHasSoftcap=*/false, kLayout, kReadsPages>;
    int most_bytes = 0;
    if (const cudaError_t status = find_shared_memory(device, most_bytes)) return status;
    constexpr int kBytesOfOne = sizeof(typename WithOne::SharedStorage),
                  kBytesOfTwo = sizeof(typename WithTwo::SharedStorage);
    if (buffers_for<Tiles>(kBytesOfOne, kBytesOfTwo, most_bytes) == 2)
      return launch_forward_kernel<WithTwo>(params, device, stream);
  }
  return launch_forward_kernel<WithOne>(params, device, stream);
}

// With softcap, and of unaligned rows, one kernel serves every mask, with one buffer.
template <ElementType kElement, int kDimQk, int kDimV, bool kHasSoftcap, RowLayout kLayout>
cudaError_t ForwardLauncher<kElement, kDimQk, kDimV, kHasSoftcap, kLayout>::launch(const ForwardParams& params,
                                                                                   cudaStream_t stream) {
  using Element = typename ElementOf<kElement>::Type;
  int device = 0;
  if (const cudaError_t status = cudaGetDevice(&device)) return status;
  if constexpr (kHasSoftcap || kLayout == RowLayout::kUnaligned) {
    if constexpr (kLayout == RowLayout::kAligned) {
      if (params.pages.table) {
        using Config =
            ForwardConfig<Element, kDimQk, kDimV, MaskKind::kMasked, 1, kHasSoftcap, kLayout, /*kReadsPages=*/true>;
        return launch_forward_kernel<Config>(params, device, stream);
      }
    }
    using Config = ForwardConfig<Element, kDimQk, kDimV, MaskKind::kMasked, 1, kHasSoftcap, kLayout>;
    return launch_forward_kernel<Config>(params, device, stream);
  } else {
    if (params.pages.table) {
      return launch_with_buffers<Element, kDimQk, kDimV, MaskKind::kMasked, /*kReadsPages=*/true>(params, device,
                                                                                                  stream);
    }
    if (params.segments.mode || params.window.left < AttentionWindow::kUnbounded)
      return launch_with_buffers<Element, kDimQk, kDimV, MaskKind::kMasked>(params, device, stream);
    if (params.window.right < AttentionWindow::kUnbounded)
      return launch_with_buffers<Element, kDimQk, kDimV, MaskKind::kCausal>(params, device, stream);
    return launch_with_buffers<Element, kDimQk, kDimV, MaskKind::kFull>(params, device, stream);
  }
}

}  // namespace selfattn::cuda::sm80
