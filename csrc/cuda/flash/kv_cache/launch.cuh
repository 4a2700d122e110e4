// Host side of one kernel instantiation: params -> grid, stages, scratch -> launches.
#pragma once
#include <algorithm>

#include "flash/tile/element.h"
#include "host/carver.h"
#include "host/device.h"
#include "kernel.cuh"
#include "launcher.h"
#include "prepare.h"

namespace selfattn::cuda::kv_cache {

inline int ceil_div(int64_t count, int64_t size) { return static_cast<int>((count + size - 1) / size); }

// How many thread blocks an SM holds, and the stages of each: as deep as shared memory allows.
struct Residency {
  int blocks, stages;
};

template <class Config>
Residency find_residency(int bytes_of_block) {
  constexpr int kOwnBytes = 1024;  // an SM has so much more than a thread block may have, and each costs it so much
  const auto stages_of = [&](int blocks) {
    const int bytes = (bytes_of_block + kOwnBytes) / blocks - kOwnBytes;
    return std::min((bytes - Config::shared_bytes(0)) / Config::kStageBytes, Config::kMostStages);
  };
  for (int blocks = Config::kMostBlocks; blocks > 1; blocks--)
    if (const int stages = stages_of(blocks); stages >= Config::kLeastStages) return {blocks, stages};
  return {1, stages_of(1)};
}

template <class Config>
KernelParams make_kernel_params(const KvCacheParams& call, int sms, int shared_memory, Carver& carver) {
  KernelParams p{};
  p.call = call;
  const auto source_of = [](const TensorView& cache, int dim) {
    return CacheSource{static_cast<const uint16_t*>(cache.data), cache.stride_batch, cache.stride_token,
                       cache.stride_head, dim};
  };
  p.caches[0] = source_of(call.k, call.dim_qk), p.caches[1] = source_of(call.v, call.dim_v);
  p.softcap = Softcap::of(call.scale, call.softcap);
  const Residency residency = find_residency<Config>(shared_memory);
  p.stages = residency.stages;
  ScheduleParams& schedule = p.schedule;
  const int64_t tokens = int64_t(call.batch) * call.queries, capacity = int64_t(call.page_size) * call.pages_per_row;
  schedule.tile_rows = Config::kTileRows;
  schedule.group = Divisor::of(call.group());
  schedule.queries = Divisor::of(call.queries), schedule.page_size = Divisor::of(call.page_size);
  schedule.tiles_per_row = Divisor::of(ceil_div(int64_t(call.queries) * call.group(), Config::kTileRows));
  // Each row with ids may have one tile that is not full.
  schedule.tiles =
      call.segment_ids
          ? static_cast<int>(tokens * call.group() / Config::kTileRows + std::min<int64_t>(tokens, call.rows))
          : call.rows * schedule.tiles_per_row.value;
  const int64_t most_keys = std::max<int64_t>(ceil_div(capacity, kUnitKeys), 1) * kUnitKeys;
  const int unit_keys = static_cast<int>(call.split_keys ? std::min(call.split_keys, most_keys) : kUnitKeys);
  schedule.unit_keys = Divisor::of(unit_keys);
  schedule.overhead = call.split_keys ? 0 : kHeadTileOverhead;
  const int units = std::max(ceil_div(capacity, unit_keys), 1);
  const int64_t most_units = int64_t(schedule.tiles) * call.num_kv_heads * (units + schedule.overhead);
  schedule.thread_blocks = static_cast<int>(std::min<int64_t>(int64_t(residency.blocks) * sms, most_units));
  schedule.splits_per_head_tile = call.split_keys ? units : 0;
  schedule.is_prepared = call.segment_ids || schedule.tiles > kMaxTilesOfWarp;

  schedule.counters = carver.take<int>(schedule.thread_blocks);
  if (schedule.is_prepared) {
    schedule.total = carver.take<int>(1);
    schedule.starts = carver.take<ShareStart>(schedule.thread_blocks);
    schedule.tile_counts_before = carver.take<int>(schedule.tiles);
  }
  if (call.segment_ids) {
    schedule.entries = carver.take<TileEntry>(schedule.tiles);
    schedule.token_order = carver.take<int>(tokens);
    schedule.token_counts = carver.take<int>(call.rows + 1);
    schedule.token_starts = carver.take<int>(call.rows + 1);
  }
  const int64_t parts =
      call.split_keys ? int64_t(schedule.tiles) * call.num_kv_heads * units : 2 * int64_t(schedule.thread_blocks);
  p.partial_stats = carver.take<SplitStats>(parts * Config::kTileRows);
  p.partial_out = carver.take<float>(parts * Config::kTileRows * Config::kDim);
  return p;
}

template <class Config>
cudaError_t make_kernel_params(const KvCacheParams& call, Carver& carver, int& device, KernelParams& p) {
  int sms = 0, shared_memory = 0;
  if (const cudaError_t status = find_device(device, sms)) return status;
  if (const cudaError_t status = find_shared_memory(device, shared_memory)) return status;
  p = make_kernel_params<Config>(call, sms, shared_memory, carver);
  return cudaSuccess;
}

// call(Config()) of the kernel for the card.
template <ElementType kElement, int kDim, TileKind kKind, class Call>
cudaError_t with_config(const Call& call) {
  using Element = typename ElementOf<kElement>::Type;
  if constexpr (kKind == TileKind::kChunk) {
    return call(Config<Element, kDim, ChunkTiles<kDim>>());
  } else {
    using Large = Config<Element, kDim, DecodeTiles<kDim, false>>;
    using Small = Config<Element, kDim, DecodeTiles<kDim, true>>;
    static_assert(Small::shared_bytes(Small::kLeastStages) <= 99 * 1024, "what every card has");
    int device = 0, sms = 0, shared_memory = 0;
    if (const cudaError_t status = find_device(device, sms)) return status;
    if (const cudaError_t status = find_shared_memory(device, shared_memory)) return status;
    return Large::shared_bytes(Large::kLeastStages) <= shared_memory ? call(Large()) : call(Small());
  }
}

template <ElementType kElement, int kDim, TileKind kKind>
int64_t Launcher<kElement, kDim, kKind>::workspace_bytes(const KvCacheParams& params) {
  Carver carver{nullptr};
  int device = 0;
  KernelParams p;
  const cudaError_t status = with_config<kElement, kDim, kKind>(
      [&](auto config) { return make_kernel_params<decltype(config)>(params, carver, device, p); });
  return status == cudaSuccess ? carver.used : 0;
}

template <class Config>
cudaError_t launch_kernels(const KvCacheParams& params, cudaStream_t stream) {
  Carver carver{static_cast<char*>(params.workspace)};
  int device = 0;
  KernelParams p;
  if (const cudaError_t status = make_kernel_params<Config>(params, carver, device, p)) return status;
  const auto kernel = flash_attention_kv_cache_kernel<Config>;
  const int bytes = Config::shared_bytes(p.stages);  // the same for all calls on this card
  if (const cudaError_t status = allow_shared_memory<Config>(kernel, bytes, device)) return status;
  if (const cudaError_t status = launch_prepare_kv_cache(p, stream)) return status;
  cudaLaunchAttribute early_start = dependent_launch();
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(p.schedule.thread_blocks);
  config.blockDim = dim3(Config::kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &early_start;
  config.numAttrs = has_dependent_launch<flash_attention_kv_cache_kernel<Config>>(device);
  return cudaLaunchKernelEx(&config, kernel, p);
}

template <ElementType kElement, int kDim, TileKind kKind>
cudaError_t Launcher<kElement, kDim, kKind>::launch(const KvCacheParams& params, cudaStream_t stream) {
  return with_config<kElement, kDim, kKind>(
      [&](auto config) { return launch_kernels<decltype(config)>(params, stream); });
}

}  // namespace selfattn::cuda::kv_cache
