// Host side of one kernel instantiation: params -> tensor maps, schedule, launch.
#pragma once
#include <numeric>

#include "flash/tile/element.h"
#include "flash/tile/make_schedule.h"
#include "host/device.h"
#include "kernel.cuh"
#include "launcher.h"

namespace selfattn::cuda::sm90 {

template <class Config>
cudaError_t launch_forward_kernel(const ForwardParams& params, cudaStream_t stream) {
  const AttentionShape& shape = params.shape;
  ForwardKernelParams p;
  p.query = make_tensor_map(params.q, params.element, shape.batch, shape.query_length, shape.num_heads, shape.dim_qk,
                            kWarpgroupRows);
  // A box ends where a page and where a key block ends; the one page of a row may end anywhere.
  const KeyPages& pages = params.pages;
  p.pages = pages;
  p.box_rows =
      Config::kReadsPages && pages.pages_per_row > 1 ? std::gcd(pages.size, Config::kTileKey) : Config::kTileKey;
  const int key_batch = Config::kReadsPages ? pages.count : shape.batch,
            key_length = Config::kReadsPages ? pages.size : shape.key_length;
  p.key =
      make_tensor_map(params.k, params.element, key_batch, key_length, shape.num_kv_heads, shape.dim_qk, p.box_rows);
  p.value =
      make_tensor_map(params.v, params.element, key_batch, key_length, shape.num_kv_heads, shape.dim_v, p.box_rows);
  p.out = make_tensor_map(params.out, params.element, shape.batch, shape.query_length, shape.num_heads, shape.dim_v,
                          kWarpgroupRows);
  p.repair_list = params.repair_list;
  p.shape = shape;
  p.window = params.window;
  p.scale = params.scale;
  p.softcap = SoftcapExponent::of(params.scale, params.softcap);
  p.lse = params.lse;
  p.sinks = params.sinks;
  p.segments = params.segments;
  constexpr int64_t kLastSectionBytes = 32 << 20;
  p.schedule = make_schedule(shape, Config::kTileQuery, Config::kMask != MaskKind::kFull, kLastSectionBytes);

  const auto kernel = flash_attention_forward_kernel<Config>;
  int device = 0, sms = 0;
  if (const cudaError_t status = find_device(device, sms)) return status;
  if (const cudaError_t status = allow_shared_memory<Config>(kernel, sizeof(typename Config::SharedStorage), device))
    return status;
  const int blocks = std::min(p.schedule.tiles, sms_to_take(sms, params.sms_left_free));
  // Where each thread block has one tile there is nothing to count.
  p.counters = p.schedule.tiles > blocks ? params.counters : nullptr;
  const bool has_segments = params.segments.mode != nullptr;
  if (!has_segments && p.counters) {
    if (const cudaError_t status = cudaMemsetAsync(p.counters, 0, kTileCounters * sizeof(int), stream)) return status;
  }
  cudaLaunchAttribute early_start = dependent_launch();
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(Config::kThreads);
  config.dynamicSmemBytes = sizeof(typename Config::SharedStorage);
  config.stream = stream;
  config.attrs = &early_start;
  config.numAttrs = has_segments ? 1 : 0;  // the kernel ahead is then the one that prepares the segments
  return cudaLaunchKernelEx(&config, kernel, p);
}

// With softcap, one kernel serves full and causal masks.
template <ElementType kElement, int kDimQk, int kDimV, bool kHasSoftcap>
cudaError_t ForwardLauncher<kElement, kDimQk, kDimV, kHasSoftcap>::launch(const ForwardParams& params,
                                                                          cudaStream_t stream) {
  using Element = typename ElementOf<kElement>::Type;
  if (params.pages.table) {
    using Config = ForwardConfig<Element, kDimQk, kDimV, MaskKind::kMasked, kHasSoftcap, /*kReadsPages=*/true>;
    return launch_forward_kernel<Config>(params, stream);
  }
  if (params.segments.mode || params.window.left < AttentionWindow::kUnbounded) {
    return launch_forward_kernel<ForwardConfig<Element, kDimQk, kDimV, MaskKind::kMasked, kHasSoftcap>>(params, stream);
  }
  if (kHasSoftcap || params.window.right < AttentionWindow::kUnbounded) {
    return launch_forward_kernel<ForwardConfig<Element, kDimQk, kDimV, MaskKind::kCausal, kHasSoftcap>>(params, stream);
  }
  if constexpr (!kHasSoftcap)
    return launch_forward_kernel<ForwardConfig<Element, kDimQk, kDimV, MaskKind::kFull>>(params, stream);
}

}  // namespace selfattn::cuda::sm90
