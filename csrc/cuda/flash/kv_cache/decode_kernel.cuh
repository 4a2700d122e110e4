// The kernel of tiles of up to 16 rows. Of a thread block's warps one half attends, each to its own slices of the keys,
// and the other brings these in, each to one of the first: each group has a ring in shared memory.
//
//   a warp of a group:                wait for a slice | S = Q K^T | softmax | O += P V | give the slot back
//   the warp that fills its ring:     wait for a free slot | start the copies of the group's next slice
//   at the end of a piece of keys:    the groups' O -> shared memory | merge them
//
// Work is cut in one of two ways:
//
// Clusters, where a call has few head tiles and its rows are about as long (launch.cuh, are_rows_level): a cluster of
// thread blocks has a tile of rows and one kv head to itself, a slice in turn for each group of each thread block. So
// nobody looks for a share, the first copies need not wait for the row's length, and results are merged through the
// shared memory of the cluster: no scratch memory, no counters, no kernel ahead that clears them.
//
// Shares, for all others: as many thread blocks as the device holds at once, each with an equal share of the keys
// (schedule.cuh), which is a row of pieces, a piece some keys of one head tile. While the groups merge one piece, the
// next one's slices come into the rings. Where a head tile is split, the thread block that arrives last merges its
// partial results, in their order.
//
// A small call takes as long as its code takes to come from cold memory: what is there twice is a function, what few
// calls want stands apart, and loops are unrolled only inside a slice. Functions read their parameters from shared
// memory: once they are there, nobody waits for memory that holds them.
#pragma once
#include "few_rows.cuh"
#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"
#include "ptx/fence.cuh"
#include "ptx/launch.cuh"
#include "ptx/mbarrier.cuh"
#include "results.cuh"
#include "rows.cuh"
#include "slice_copies.cuh"

namespace selfattn::cuda::kv_cache {

constexpr int kMostClusterBlocks = 16;

// Behind the rings.
template <class Config>
struct DecodeState {
  static constexpr int kGroups = Config::kKeyGroups, kWarps = 2 * kGroups, kThreads = kWarps * kWarpSize;
  static constexpr int kMostParts = kMostClusterBlocks * kGroups;  // of a head tile, in a cluster
  // Whether groups leave what a piece gave beside their rings, or in the slots that they read last.
  static constexpr bool kHasOwnOutputs = Config::kTileRows * Config::kDim <= 1024;
  static_assert(Config::kRowWarps == 1);

  KernelParams params;
  alignas(128) unsigned char query[2][Config::Query::kBytes];  // of two pieces in turn
  alignas(16) float own_outputs[kGroups][kHasOwnOutputs ? Config::kTileRows * Config::kDim : 4];
  SplitStats stats[kGroups][Config::kTileRows];
  const float* outputs[kGroups];  // null: the group had no slice
  float weights[kWarps][kMostParts];
  Share shares[kWarps];   // the same in all
  Walk walks[2][kWarps];  // of two pieces in turn
  int is_last_arriver;
  uint64_t filled[kGroups][Config::kMostStages], read[kGroups][Config::kMostStages];

  static constexpr int shared_bytes(int stages) { return stages * Config::kStageBytes + int(sizeof(DecodeState)); }
};

// Of warps that attend.
template <class Config>
__device__ __forceinline__ void sync_readers() {
  constexpr int kReadersBarrier = 1;
  ptx::barrier_sync(kReadersBarrier, Config::kWarps * kWarpSize);
}

// A group's slices of some keys, from the one with first_key on, a step apart. Returns the stage of the slot read last,
// which is given back only where `gives_last`; -1: there was none.
template <class Config, class Rows>
__device__ __forceinline__ int attend_slices(const KernelParams& p, const Ring<Config>& ring, Rows& rows, Slot& slot,
                                             int first_key, int last_key, int step_keys, bool gives_last) {
  int last_stage = -1;
#pragma unroll 1
  for (int key = first_key; key < last_key; key += step_keys) {
    last_stage = slot.stage;
    ptx::mbarrier_wait(ring.filled[last_stage], slot.parity);
    rows.attend(ring.slot(last_stage), key);
    __syncwarp();
    const bool is_given = gives_last || key + step_keys < last_key;
    if (is_given && threadIdx.x % kWarpSize == 0) ptx::mbarrier_arrive(ring.read[last_stage]);
    slot.advance(p.stages);
  }
  return last_stage;
}

// ---------------------------------------------------------------- shares

// The first slice of an interval of keys that a group has.
template <class Config>
__device__ __forceinline__ int first_slice_of(const Interval& keys, int group) {
  const int first = keys.begin / Config::kSliceKeys;
  return first + (group + Config::kKeyGroups - first % Config::kKeyGroups) % Config::kKeyGroups;
}

template <class Config>
__device__ __forceinline__ void read_share(const KernelParams& p, DecodeState<Config>& s_state,
                                           const Ring<Config>& ring, const Share& s_share, int group) {
  using State = DecodeState<Config>;
  const KernelParams& s_p = s_state.params;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  RowsOf<Config> rows(p, s_p);
  Slot slot;
  ptx::wait_for_previous_kernel();  // it clears the counters
  int turn = 0;
  const auto find_piece = [&] {
    const bool is_found = find_next(s_p, s_share, s_state.walks[turn][group]);
    if (is_found) copy_query<Config>(s_p, s_state.walks[turn][group], ptx::shared_address(s_state.query[turn]));
    return is_found;
  };
  bool has_piece = find_piece();
#pragma unroll 1
  while (has_piece) {
    const Walk& s_walk = s_state.walks[turn][group];
    rows.begin(s_walk);
    ptx::wait_for_copies<0>();
    sync_readers<Config>();  // the queries are there
    rows.take_query(ptx::shared_address(s_state.query[turn]));
    const Interval keys = s_walk.piece.keys;
    const int first_key = first_slice_of<Config>(keys, group) * Config::kSliceKeys;
    const int last_stage = attend_slices(p, ring, rows, slot, first_key, keys.end,
                                         Config::kKeyGroups * Config::kSliceKeys, State::kHasOwnOutputs);
    float* s_out = nullptr;
    if (last_stage >= 0) {
      s_out = State::kHasOwnOutputs ? s_state.own_outputs[group] : reinterpret_cast<float*>(ring.slot(last_stage));
      rows.leave_output(s_out, s_walk.tile.count);
      if constexpr (kHasTma && !State::kHasOwnOutputs) ptx::fence_proxy_async_shared();  // TMA writes there next
    }
    rows.leave_stats(s_state.stats[group]);
    if (lane == 0) s_state.outputs[group] = s_out, s_state.walks[turn ^ 1][group] = s_walk;
    __syncwarp();
    turn ^= 1;
    has_piece = find_piece();  // whose queries come while this one is merged
    sync_readers<Config>();    // the groups' results are there
    const Parts parts = find_parts(s_p, s_share, s_walk);
    merge_groups<Config>(s_p, s_state.stats[0], s_state.outputs, parts, s_walk, group);
    sync_readers<Config>();  // these have been read, and all results of the piece are written
    if (!State::kHasOwnOutputs && last_stage >= 0 && lane == 0) ptx::mbarrier_arrive(ring.read[last_stage]);
    if (ends_head_tile(s_p, parts, s_walk, s_state.is_last_arriver, threadIdx.x, [] { sync_readers<Config>(); }))
      merge_parts<Config>(s_p, parts, s_walk, group);
  }
}

template <class Config>
__device__ __forceinline__ void fill_share(const DecodeState<Config>& s_state, const CacheMaps& maps,
                                           const Ring<Config>& ring, const Share& s_share, Walk& s_walk, int group) {
  const KernelParams& s_p = s_state.params;
  SliceCopies<Config> copies(s_p, maps, ring, Config::kKeyGroups);
#pragma unroll 1
  while (find_next(s_p, s_share, s_walk)) {
    const Interval& keys = s_walk.piece.keys;
    copies.begin(keys, s_walk.piece.kv_head, first_slice_of<Config>(keys, group));
#pragma unroll 1
    while (copies.has_next()) copies.load_next(s_walk.tile);
  }
}

// ---------------------------------------------------------------- clusters

// What every warp of a thread block knows of its work, before the row's length is there.
struct ClusterPlace {
  int tile_index, kv_head;
  int first_slice, step;  // of the group, from the first slice of the keys on; to its next one

  template <class Config>
  static __device__ __forceinline__ ClusterPlace find(const KernelParams& p, int group) {
    const int rank = ptx::cluster_rank(), blocks = ptx::cluster_blocks();
    const int head_tile = static_cast<int>(blockIdx.x) / blocks, tile = head_tile / p.call.num_kv_heads;
    return {tile, head_tile - tile * p.call.num_kv_heads, rank * Config::kKeyGroups + group,
            blocks * Config::kKeyGroups};
  }
  // Without a window to the left the first keys are those of the cache, whatever its length: the copies of the first
  // slices, or the look at the table that says where they are, need not wait for it.
  static __device__ __forceinline__ bool begins_at_first_key(const KvCacheParams& call) {
    return call.window.left >= AttentionWindow::kUnbounded;
  }
  template <class Config>
  __device__ __forceinline__ int first_slice_of(const KvCacheParams& call, const Interval& keys) const {
    return (begins_at_first_key(call) ? 0 : keys.begin / Config::kSliceKeys) + first_slice;
  }
};

template <class Config>
__device__ __forceinline__ void read_slices(const KernelParams& p, DecodeState<Config>& s_state,
                                            const Ring<Config>& ring, const ClusterPlace& place, Walk& s_walk,
                                            int length, int group) {
  const KernelParams& s_p = s_state.params;
  const KvCacheParams& call = s_p.call;
  copy_query<Config>(s_p, s_walk, ptx::shared_address(s_state.query[0]));
  const Tile tile = describe_tile(s_p, s_walk.tile.entry, length);
  __syncwarp();  // all have read the entry, which is written over itself
  if (threadIdx.x % kWarpSize == 0) s_walk.tile = tile, s_walk.piece.keys = tile.keys;
  __syncwarp();
  RowsOf<Config> rows(p, s_p);
  rows.begin(s_walk);
  ptx::wait_for_copies<0>();
  sync_readers<Config>();  // the queries are there
  rows.take_query(ptx::shared_address(s_state.query[0]));
  const int first_key = place.first_slice_of<Config>(call, tile.keys) * Config::kSliceKeys;
  Slot slot;
  const bool has_slice =
      attend_slices(p, ring, rows, slot, first_key, tile.keys.end, place.step * Config::kSliceKeys, false) >= 0;
  // A first slice behind the last key is on its way all the same.
  if (!has_slice && ClusterPlace::begins_at_first_key(call) && !call.page_table && first_key < call.page_size)
    ptx::mbarrier_wait(ring.filled[0], 0);
  rows.leave_stats(s_state.stats[group]);
  rows.leave_output(reinterpret_cast<float*>(ring.slot(0)), tile.count);
}

template <class Config>
__device__ __forceinline__ void fill_slices(const DecodeState<Config>& s_state, const CacheMaps& maps,
                                            const Ring<Config>& ring, const ClusterPlace& place, Walk& s_walk,
                                            int length) {
  const KernelParams& s_p = s_state.params;
  const KvCacheParams& call = s_p.call;
  SliceCopies<Config> copies(s_p, maps, ring, place.step);
  const bool is_early = ClusterPlace::begins_at_first_key(call);
  int64_t first_page = 0;
  if (is_early) {
    copies.begin({0, call.page_size * call.pages_per_row}, place.kv_head, place.first_slice);
    first_page = copies.look_up_page(s_walk.tile);
    if (!call.page_table && copies.has_next()) copies.load_next(s_walk.tile);
  }
  const Tile tile = describe_tile(s_p, s_walk.tile.entry, length);
  __syncwarp();  // all have read the entry, which is written over itself
  if (threadIdx.x % kWarpSize == 0) s_walk.tile = tile;
  __syncwarp();
  if (is_early)
    copies.cut(tile.keys);
  else
    copies.begin(tile.keys, place.kv_head, place.first_slice_of<Config>(call, tile.keys));
  if (is_early && call.page_table) copies.take_page(s_walk.tile, first_page);
#pragma unroll 1
  while (copies.has_next()) copies.load_next(s_walk.tile);
}

// The results of all groups of the cluster become the output: a warp a row, some of its columns in each thread block.
template <class Config>
__device__ __forceinline__ void merge_cluster(const KernelParams& p, DecodeState<Config>& s_state, const Walk& s_walk,
                                              uint32_t s_outputs, int group_bytes) {
  using State = DecodeState<Config>;
  constexpr int kQuad = 4, kPartsOfLane = State::kMostParts / kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int rank = ptx::cluster_rank(), blocks = ptx::cluster_blocks(), parts = blocks * State::kGroups;
  const int columns = Config::kDim / blocks, quads = ::min(columns / kQuad, kWarpSize), subsets = kWarpSize / quads;
  const float c = logit_scale(p) * kLog2E;
  float* s_weights = s_state.weights[warp];
#pragma unroll 1
  for (int row = warp; row < s_walk.tile.count; row += State::kWarps) {
    SplitStats stats[kPartsOfLane];
    float top = -infinity(), sum = 0.f;
#pragma unroll
    for (int i = 0; i < kPartsOfLane; i++) {
      const int part = i * kWarpSize + lane;
      stats[i] = {-infinity(), 0.f};
      if (part < parts)
        stats[i] = ptx::load_pair_of_cluster(ptx::address_in_block(
            ptx::shared_address(&s_state.stats[part % State::kGroups][row]), part / State::kGroups));
      top = fmaxf(top, stats[i].x);
    }
    top = warp_max(top);
    const float base = top == -infinity() ? 0.f : top;
#pragma unroll
    for (int i = 0; i < kPartsOfLane; i++) {
      const float weight = ptx::exp2_approx((stats[i].x - base) * c);
      sum += stats[i].y * weight;
      s_weights[i * kWarpSize + lane] = weight;
    }
    sum = warp_sum(sum);
    __syncwarp();
    const RowTarget<Config> target(p, s_walk, row, {top, sum}, lane == 0 && rank == 0);
#pragma unroll 1
    for (int first = 0; first < columns; first += quads * kQuad) {
      const int column = rank * columns + first + lane % quads * kQuad;
      const uint32_t s_column = s_outputs + place_of_output<Config>(row, column) * int(sizeof(float));
      float out[kQuad] = {};
#pragma unroll 4
      for (int part = lane / quads; part < parts; part += subsets) {
        const float weight = s_weights[part];
        const float4 four = ptx::load_four_of_cluster(
            ptx::address_in_block(s_column + part % State::kGroups * group_bytes, part / State::kGroups));
        out[0] += four.x * weight, out[1] += four.y * weight, out[2] += four.z * weight, out[3] += four.w * weight;
      }
#pragma unroll 1
      for (int distance = quads; distance < kWarpSize; distance *= 2) {
#pragma unroll
        for (int i = 0; i < kQuad; i++) out[i] += __shfl_xor_sync(~0u, out[i], distance);
      }
      if (lane < quads) target.template store<kQuad>(column, out);
    }
    __syncwarp();  // the weights have been read
  }
}

// ---------------------------------------------------------------- kernels

// What both begin with, up to a barrier of the thread block.
template <class Config>
__device__ __forceinline__ Ring<Config> begin_thread_block(const KernelParams& p, const CacheMaps& maps,
                                                           DecodeState<Config>& s_state, unsigned char* s_rings) {
  using State = DecodeState<Config>;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int group = warp % State::kGroups;
  if (kHasTma && warp == State::kGroups && lane < 2) ptx::prefetch_tensor_map(&maps.of[lane].map);
  copy_words(p, s_state.params, threadIdx.x, State::kThreads);
  const Ring<Config> ring{s_rings + group * p.stages * Config::kSlotBytes, s_state.filled[group], s_state.read[group]};
  if (lane == 0) {  // a few each: one takes as long as a look at shared memory
    const bool is_reader = warp < State::kGroups;
#pragma unroll 1
    for (int stage = 0; stage < p.stages; stage++)
      ptx::mbarrier_init(is_reader ? ring.filled[stage] : ring.read[stage], is_reader ? Ring<Config>::kFillers : 1);
    if constexpr (kHasTma) ptx::fence_mbarrier_init();
  }
  __syncthreads();
  return ring;
}

template <class Config>
__device__ __forceinline__ void attend_share(const KernelParams& p, const CacheMaps& maps, DecodeState<Config>& s_state,
                                             const Ring<Config>& ring) {
  using State = DecodeState<Config>;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, group = warp % State::kGroups;
  const KernelParams& s_p = s_state.params;
  Share& share = s_state.shares[warp];
  Walk& walk = s_state.walks[0][warp];
  begin_share(s_p, share, walk);
  if (warp < State::kGroups)
    read_share(p, s_state, ring, share, group);
  else
    fill_share(s_state, maps, ring, share, walk, group);
  ptx::wait_for_previous_kernel();
  if (s_p.call.segment_ids) finish_queries_of_none(s_p);
}

template <class Config>
__device__ __forceinline__ void attend_in_cluster(const KernelParams& p, const CacheMaps& maps,
                                                  DecodeState<Config>& s_state, const Ring<Config>& ring,
                                                  unsigned char* s_rings) {
  using State = DecodeState<Config>;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, group = warp % State::kGroups;
  const KernelParams& s_p = s_state.params;
  const ClusterPlace place = ClusterPlace::find<Config>(s_p, group);
  const TileEntry entry = find_entry(s_p, place.tile_index);
  const int length = read_length(s_p.call, entry.row);  // nobody waits for it here
  Walk& walk = s_state.walks[0][warp];
  if (threadIdx.x % kWarpSize == 0) {
    walk.tile.entry = entry;
    walk.tile.count = rows_of(s_p, entry);
    walk.piece.kv_head = place.kv_head;
  }
  __syncwarp();
  if (warp < State::kGroups)
    read_slices(p, s_state, ring, place, walk, length, group);
  else
    fill_slices(s_state, maps, ring, place, walk, length);
  __syncwarp();
  ptx::cluster_arrive();
  ptx::cluster_wait();
  merge_cluster(s_p, s_state, walk, ptx::shared_address(s_rings), p.stages * Config::kSlotBytes);
  __syncwarp();
  ptx::cluster_arrive();  // nobody's shared memory may go before all have read it
  ptx::cluster_wait();
}

// A thread block takes such a part of what the memory gives: fewer than these hold it up.
constexpr int kBlocksForMemory = 64;

// Whether the thread blocks of the longest row hold up the others for less time than shares take beside their work.
template <class Config>
__device__ __forceinline__ bool are_rows_level(const KernelParams& p) {
  constexpr int kOverheadBytes = 24 << 20;  // that the memory gives meanwhile: 6 us on an H200
  int most = 0;
  unsigned sum = 0;
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x) % kWarpSize; row < p.call.rows; row += kWarpSize) {
    const int length = read_length(p.call, row);
    most = ::max(most, length), sum += static_cast<unsigned>(length);
  }
  most = __reduce_max_sync(~0u, most), sum = __reduce_add_sync(~0u, sum);
  const float bytes_of_key = 2.f * static_cast<float>(p.call.dim_qk + p.call.dim_v);
  const float longest = static_cast<float>(most) * kBlocksForMemory / static_cast<float>(p.schedule.cluster_blocks);
  const float all = static_cast<float>(sum) * static_cast<float>(p.call.num_kv_heads);
  return (longest - all) * bytes_of_key < kOverheadBytes;
}

// How a call's work is cut: kEither finds out by the lengths. Kernels of their own, since there is no time in a small
// call for code that it does not want to come from memory.
enum class Cut { kShares, kClusters, kEither };

// Cards of compute capability 12.0 have little shared memory, those of 9.0 and 10.0 much, where tiles for little are
// for tests; kEither is for Hopper, on which it was measured. What no card asks for is left out of the library.
constexpr int kSmallCards = 120, kHopper = 90;

template <class Config>
constexpr bool kFindsOut = Config::kWarpRows == 8;  // for 16 rows there is no kEither

// capability: 10 * major + minor.
template <class Config, Cut kCut>
__host__ __device__ constexpr bool is_kernel_wanted(int capability) {
  if (kCut == Cut::kEither && (!kFindsOut<Config> || capability != kHopper)) return false;
  if (kCut != Cut::kShares && capability < (Config::kIsSmall ? kSmallCards : kHopper)) return false;
  return Config::kIsSmall || capability < kSmallCards;
}

template <class Config, Cut kCut>
__global__ void __launch_bounds__(DecodeState<Config>::kThreads, Config::kMostBlocks)
    flash_attention_kv_cache_kernel(const __grid_constant__ KernelParams p, const __grid_constant__ CacheMaps maps) {
#ifdef __CUDA_ARCH__
  if constexpr (is_kernel_wanted<Config, kCut>(__CUDA_ARCH__ / 10)) {
    extern __shared__ __align__(1024) unsigned char s_rings[];  // as the swizzle of TMA wants
    auto& s_state = *reinterpret_cast<DecodeState<Config>*>(s_rings + p.stages * Config::kStageBytes);
    const Ring<Config> ring = begin_thread_block(p, maps, s_state, s_rings);
    if constexpr (kCut == Cut::kShares) {
      attend_share(p, maps, s_state, ring);
    } else {
      if (kCut == Cut::kClusters || are_rows_level<Config>(s_state.params))
        attend_in_cluster(p, maps, s_state, ring, s_rings);
      else
        attend_share(p, maps, s_state, ring);
    }
  }
#endif
}

}  // namespace selfattn::cuda::kv_cache
