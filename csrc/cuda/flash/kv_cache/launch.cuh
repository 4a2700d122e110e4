// Host side of one kernel instantiation: params -> grid, stages, scratch -> launches.
#pragma once
#include <algorithm>
#include <atomic>
#include <type_traits>

#include "chunk_kernel.cuh"
#include "decode_kernel.cuh"
#include "flash/tensor_map.h"
#include "flash/tile/element.h"
#include "host/carver.h"
#include "host/device.h"
#include "launcher.h"
#include "prepare.h"

namespace selfattn::cuda::kv_cache {

// Thread blocks of one head tile, where there are so few that all of them read it.
constexpr int kMostParts = 16;

inline int ceil_div(int64_t count, int64_t size) { return static_cast<int>((count + size - 1) / size); }

// Whether thread blocks stand in clusters, and whether they do what clusters do whatever the lengths.
struct ClusterChoice {
  int blocks = 0;
  bool is_level = false;
};

struct Card {
  int device = 0, sms = 0, shared_memory = 0;

  cudaError_t find() {
    if (const cudaError_t status = find_device(device, sms)) return status;
    return find_shared_memory(device, shared_memory);
  }
};

// How many thread blocks an SM holds, and the stages of each: as deep as shared memory allows.
struct Residency {
  int blocks, stages;
};

template <class Config>
using StateOf = std::conditional_t<Config::kKeyGroups == 1, ChunkState<Config>, DecodeState<Config>>;

template <class Config>
Residency find_residency(int bytes_of_block) {
  constexpr int kOwnBytes = 1024;  // an SM has so much more than a thread block may have, and each costs it so much
  const auto stages_of = [&](int blocks) {
    const int bytes = (bytes_of_block + kOwnBytes) / blocks - kOwnBytes;
    return std::min((bytes - StateOf<Config>::shared_bytes(0)) / Config::kStageBytes, Config::kMostStages);
  };
  for (int blocks = Config::kMostBlocks; blocks > 1; blocks--)
    if (const int stages = stages_of(blocks); stages >= Config::kLeastStages) return {blocks, stages};
  return {1, stages_of(1)};
}

template <class Config>
KernelParams make_kernel_params(const KvCacheParams& call, const Card& card, const ClusterChoice& clusters,
                                Carver& carver) {
  KernelParams p{};
  p.call = call;
  const auto source_of = [](const TensorView& cache, int dim) {
    return CacheSource{static_cast<const uint16_t*>(cache.data), cache.stride_batch, cache.stride_token,
                       cache.stride_head, dim};
  };
  p.caches[0] = source_of(call.k, call.dim_qk), p.caches[1] = source_of(call.v, call.dim_v);
  p.softcap = Softcap::of(call.scale, call.softcap);
  const Residency residency = find_residency<Config>(card.shared_memory);
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
  int64_t thread_blocks = int64_t(residency.blocks) * card.sms;
  // One head tile is merged by one thread block: not of more parts than the memory wants.
  if (!call.segment_ids)
    thread_blocks = std::min<int64_t>(
        thread_blocks, std::max<int64_t>(kBlocksForMemory, int64_t(schedule.tiles) * call.num_kv_heads * kMostParts));
  schedule.thread_blocks = static_cast<int>(std::min(thread_blocks, most_units));
  schedule.splits_per_head_tile = call.split_keys ? units : 0;
  schedule.is_prepared = call.segment_ids || schedule.tiles > kMaxTilesOfWarp;
  if (clusters.blocks > 0) {
    schedule.cluster_blocks = clusters.blocks, schedule.is_level = clusters.is_level;
    schedule.thread_blocks = call.rows * call.num_kv_heads * clusters.blocks;
    if (clusters.is_level) return p;
  }

  schedule.counters = carver.take<int>(schedule.thread_blocks);
  if (schedule.is_prepared) {
    schedule.totals = carver.take<ShareTotals>(1);
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

// call(Config()) of the kernels for the card.
template <ElementType kElement, int kDim, TileKind kKind, class Call>
auto with_config(const Card& card, const Call& call) {
  using Element = typename ElementOf<kElement>::Type;
  if constexpr (kKind == TileKind::kChunk) {
    return call(Config<Element, kDim, ChunkTiles<kDim>>());
  } else {
    constexpr int kRows = kKind == TileKind::kFew ? kFewRows : kDecodeRows;
    using Large = Config<Element, kDim, DecodeTiles<kDim, kRows, false>>;
    using Small = Config<Element, kDim, DecodeTiles<kDim, kRows, true>>;
    constexpr int kOfEveryCard = 99 * 1024;
    static_assert(StateOf<Small>::shared_bytes(Small::kLeastStages) <= kOfEveryCard &&
                  StateOf<Large>::shared_bytes(Large::kLeastStages) > kOfEveryCard);
    return StateOf<Large>::shared_bytes(Large::kLeastStages) <= card.shared_memory ? call(Large()) : call(Small());
  }
}

// A launch, of clusters where cluster_blocks > 0.
class Launch {
 public:
  Launch(int thread_blocks, int threads, int bytes, int cluster_blocks, bool starts_early, cudaStream_t stream) {
    config_.gridDim = dim3(static_cast<unsigned>(thread_blocks));
    config_.blockDim = dim3(static_cast<unsigned>(threads));
    config_.dynamicSmemBytes = bytes;
    config_.stream = stream;
    config_.attrs = attributes_;
    if (starts_early) attributes_[config_.numAttrs++] = dependent_launch();
    if (cluster_blocks > 0) {
      cudaLaunchAttribute& cluster = attributes_[config_.numAttrs++];
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {static_cast<unsigned>(cluster_blocks), 1, 1};
    }
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  const cudaLaunchConfig_t* config() const { return &config_; }

 private:
  cudaLaunchAttribute attributes_[2]{};
  cudaLaunchConfig_t config_{};
};

template <auto kKernel>
struct KernelTag {};  // of what is kept for it

// The shared memory of a thread block, the same for all calls on this card.
template <class Config>
int bytes_of_block(const Card& card) {
  return StateOf<Config>::shared_bytes(find_residency<Config>(card.shared_memory).stages);
}

// Of more thread blocks than every card has room for.
template <class Config>
bool allow_large_clusters() {
  const auto allow = [](auto kernel) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess;
  };
  if constexpr (kFindsOut<Config>)
    if (!allow(flash_attention_kv_cache_kernel<Config, Cut::kEither>)) return false;
  return allow(flash_attention_kv_cache_kernel<Config, Cut::kClusters>);
}

// How many clusters of so many thread blocks run at once; 0 where the card, or what this build has for it, knows none.
template <class Config>
int find_active_clusters(const Card& card, int blocks) {
  constexpr int kUnknown = 0, kNone = -1;
  static std::atomic<int> counts[kMaxDevices][kMostClusterBlocks + 1];
  int count = counts[card.device][blocks].load(std::memory_order_relaxed);
  if (count == kUnknown) {
    constexpr auto kKernel = flash_attention_kv_cache_kernel<Config, Cut::kClusters>;
    const int bytes = bytes_of_block<Config>(card);
    const Launch launch(blocks, DecodeState<Config>::kThreads, bytes, blocks, false, nullptr);
    const bool is_known = allow_shared_memory<KernelTag<kKernel>>(kKernel, bytes, card.device) == cudaSuccess &&
                          allow_large_clusters<Config>() &&
                          cudaOccupancyMaxActiveClusters(&count, kKernel, launch.config()) == cudaSuccess;
    if (!is_known || count == 0) count = kNone;
    cudaGetLastError();  // an answer, not an error that a later check should find
    counts[card.device][blocks].store(count, std::memory_order_relaxed);
  }
  return count == kNone ? 0 : count;
}

// All clusters must run at once. A row that is longer than the others keeps its own thread blocks busy while those of
// the others are done; the kernel finds out by the lengths, and takes shares then, for which another kernel must have
// cleared the counters. Where the worst case, one row full and the others empty, takes kWorst longer at most, it is
// spared that.
template <class Config>
ClusterChoice choose_clusters(const KvCacheParams& call, const Card& card) {
  if constexpr (Config::kKeyGroups == 1) {
    return {};
  } else {
    const int version = find_ptx_version<flash_attention_kv_cache_kernel<Config, Cut::kClusters>>(card.device);
    if (call.segment_ids || call.split_keys || !is_kernel_wanted<Config, Cut::kClusters>(version)) return {};
    constexpr int64_t kWorst = int64_t(128) << 20;  // bytes that the memory gives: 30 us on an H200
    constexpr int kLeastKeys = 2 * Config::kKeyGroups * Config::kSliceKeys;  // of a thread block, beside its start
    const int64_t head_tiles = int64_t(call.rows) * call.num_kv_heads;       // a row has one tile
    const int64_t capacity = int64_t(call.page_size) * call.pages_per_row;
    const int64_t bytes_of_head = capacity * (call.dim_qk + call.dim_v) * int64_t(sizeof(uint16_t));
    for (int blocks = kMostClusterBlocks; blocks > 0; blocks /= 2) {
      if (blocks > 1 && blocks * kLeastKeys > capacity) continue;
      if (head_tiles > find_active_clusters<Config>(card, blocks)) continue;
      const int64_t worst = kBlocksForMemory * bytes_of_head / blocks;
      const bool is_level = worst <= bytes_of_head * call.num_kv_heads + kWorst;
      const bool finds_out = is_kernel_wanted<Config, Cut::kEither>(version) && head_tiles * blocks >= kBlocksForMemory;
      if (!is_level && !finds_out) return {};
      return {blocks, is_level};
    }
    return {};
  }
}

// Without promotion: more than a panel's row ahead would be another head's, and costs the memory 8 % of its speed.
template <class Config>
CacheMaps make_cache_maps(const KvCacheParams& call) {
  const bool is_slice_in_page = !call.page_table || call.page_size % Config::kSliceKeys == 0;
  CacheMaps maps;
  maps.sub_slices = is_slice_in_page ? Config::kSubSlices : 1;
  const auto map_of = [&](const TensorView& cache, int dim) {
    const int pages = cache.stride_batch ? call.pages : 1, heads = cache.stride_head ? call.num_kv_heads : 1;
    return CacheMap{make_tensor_map(cache, call.element, pages, call.page_size, heads, dim,
                                    maps.sub_slices * kPageMultiple, CU_TENSOR_MAP_L2_PROMOTION_NONE),
                    cache.stride_batch ? 1 : 0, cache.stride_head ? 1 : 0};
  };
  maps.of[0] = map_of(call.k, call.dim_qk), maps.of[1] = map_of(call.v, call.dim_v);
  return maps;
}

// With scratch memory, where the call needs any.
template <class Config>
KernelParams make_kernel_params(const KvCacheParams& call, const Card& card, const WorkspaceAllocator& allocate) {
  const ClusterChoice clusters = choose_clusters<Config>(call, card);
  Carver needed{nullptr};
  const KernelParams p = make_kernel_params<Config>(call, card, clusters, needed);
  if (needed.used == 0) return p;
  Carver carver{static_cast<char*>(allocate(needed.used))};
  return make_kernel_params<Config>(call, card, clusters, carver);
}

template <class Config, auto kKernel, class... Maps>
cudaError_t launch_kernel(const KernelParams& p, const Card& card, int threads, cudaStream_t stream,
                          const Maps&... maps) {
  const ScheduleParams& schedule = p.schedule;
  const int bytes = bytes_of_block<Config>(card);
  if (const cudaError_t status = allow_shared_memory<KernelTag<kKernel>>(kKernel, bytes, card.device)) return status;
  bool starts_early = false;
  if (!schedule.is_level) {
    if (const cudaError_t status = launch_prepare_kv_cache(p, stream)) return status;
    starts_early = has_dependent_launch<kKernel>(card.device);
  }
  const Launch launch(schedule.thread_blocks, threads, bytes, schedule.cluster_blocks, starts_early, stream);
  return cudaLaunchKernelEx(launch.config(), kKernel, p, maps...);
}

template <ElementType kElement, int kDim, TileKind kKind>
cudaError_t Launcher<kElement, kDim, kKind>::launch(const KvCacheParams& params, const WorkspaceAllocator& allocate,
                                                    cudaStream_t stream) {
  Card card;
  if (const cudaError_t status = card.find()) return status;
  return with_config<kElement, kDim, kKind>(card, [&](auto config) {
    using Config = decltype(config);
    const KernelParams p = make_kernel_params<Config>(params, card, allocate);
    if constexpr (kKind == TileKind::kChunk) {
      constexpr auto kKernel = flash_attention_kv_cache_chunk_kernel<Config>;
      return launch_kernel<Config, kKernel>(p, card, Config::kWarps * kWarpSize, stream);
    } else {
      const auto launch = [&]<Cut kCut>() {
        constexpr auto kKernel = flash_attention_kv_cache_kernel<Config, kCut>;
        const bool has_tma = is_built_for_hopper<kKernel>(card.device);
        const CacheMaps maps = has_tma ? make_cache_maps<Config>(params) : CacheMaps{};
        return launch_kernel<Config, kKernel>(p, card, DecodeState<Config>::kThreads, stream, maps);
      };
      if (p.schedule.cluster_blocks == 0) return launch.template operator()<Cut::kShares>();
      if constexpr (kFindsOut<Config>)
        if (!p.schedule.is_level) return launch.template operator()<Cut::kEither>();
      return launch.template operator()<Cut::kClusters>();
    }
  });
}

}  // namespace selfattn::cuda::kv_cache
