// The producer warp of the kernels that own tiles of keys: decides which query tiles a tile of keys meets, in which
// order, with which mask, and brings them in. Consumers follow what it announces and know no schedule.
#pragma once
#include <type_traits>

#include "config.cuh"
#include "exceptional.cuh"
#include "intervals.cuh"
#include "ptx/fence.cuh"
#include "ptx/grid.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"

namespace selfattn::cuda::sm90 {

struct BackwardMaps {
  CUtensorMap q, k, v, grad_out, grad_k, grad_v;
  CUtensorMap background_out, background_grad_out;  // boxes of kBackgroundRows
};

// kIsRepair: the second pass of the two-pass form, over the tiles of the list, or over all.
template <class Config, bool kIsRepair = false>
struct QueryProducer {
  using Storage = typename Config::SharedStorage;
  static constexpr int kTileQ = Config::kTileQ, kTileKv = Config::kTileKv;
  static constexpr unsigned kAllLanes = ~0u;
  static constexpr int kBothWarpgroups = 3;

  const BackwardMaps& maps;
  const BackwardParams& p;
  const BackwardSchedule& schedule;
  Storage& s;
  bool repairs_all = false;
  int lane = threadIdx.x % 32;
  Ring<Config::kStages> ring = {};
  Ring<Config::kKeyBuffers> key_ring = {};
  int next_work = -1, next_warpgroups = kBothWarpgroups;  // of lane 0

  // The keys at work.
  int batch = 0, kv_head = 0, key_tile = 0;
  int section = -1, warpgroups = kBothWarpgroups;
  RowSegments segments = {};
  bool keys_are_loaded = false;
  bool is_upward = false;  // the walk over the query tiles
  // The query tile found last. It is announced when the next one is found, or as the last of the key tile.
  int pending_tile = -1, pending_flags = 0;

  __device__ __forceinline__ void run() {
    int work = blockIdx.x;
    if (is_listed()) {
      claim_next();
      work = __shfl_sync(kAllLanes, next_work, 0);
      next_work = -1;
    }
    while (work < schedule.work_tiles()) {
      take_tile(work);
      produce_tile();
      work = __shfl_sync(kAllLanes, next_work, 0);
      next_work = -1;
      key_ring.advance();
    }
    ptx::mbarrier_wait(s.k_empty[key_ring.stage], key_ring.parity ^ 1);
    if (lane == 0) {
      s.tile[key_ring.stage].key_tile = -1;
      ptx::mbarrier_arrive(s.k_full[key_ring.stage]);
      if (Config::kSumsQueries && p.is_deterministic) {
        ptx::mbarrier_wait(s.q_empty[ring.stage], ring.parity ^ 1);
        s.block[ring.stage].flags = kEndOfBlocks;
        ptx::mbarrier_arrive(s.q_full[ring.stage]);
      }
    }
  }

  // Sections one after another; in a section the longest key tiles of all its KV groups first. In the deterministic
  // mode in the order in which dQ is added up, so that no tile waits for one that starts later.
  __device__ __forceinline__ void take_tile(int work) {
    const int tiles_of_section = schedule.kv_groups_per_section * schedule.key_tiles, section_before = section;
    section = work / tiles_of_section;
    const int groups = schedule.kv_groups_in(section), rest = work % tiles_of_section, rank = rest / groups;
    const int kv_group =
        is_listed() ? work / schedule.key_tiles : section * schedule.kv_groups_per_section + rest % groups;
    batch = kv_group / p.shape.num_kv_heads, kv_head = kv_group % p.shape.num_kv_heads;
    segments = segments_of_row(p.segments, batch);
    if (Config::kSumsQueries && p.is_deterministic)
      key_tile = schedule.walks_upward ? schedule.key_tiles - 1 - rank : rank;
    else
      key_tile = p.segments.mode ? p.segments.order[int64_t(batch) * schedule.key_tiles + rank] : rank;
    if (is_listed()) key_tile = work % schedule.key_tiles;
    warpgroups = next_warpgroups;
    is_upward = schedule.walks_upward || (schedule.reverses && rest >= static_cast<int>(gridDim.x));
    keys_are_loaded = false;
    if (schedule.has_background_warps && section != section_before && section > 0) {
      ptx::wait_for_count(schedule.rows_preprocessed(section),
                          schedule.heads_in(section) * schedule.dq_tile_rows * Config::kPanels);
      ptx::fence_proxy_async_global();
    }
  }

  __device__ __forceinline__ void produce_tile() {
    if (Config::kKeyBuffers > 1) load_keys();  // the other buffer's tile is still at work
    const Interval tiles = query_tiles_of<Config>(p, batch, segments.has_runs, key_tile);
    // Queries that see every (some) key of a warpgroup.
    Interval by_all[2], by_some[2];
#pragma unroll
    for (int w = 0; w < 2; w++) {
      const int keys = Config::kIsD256 ? kTileKv : kTileKv / 2,
                first = key_tile * kTileKv + (Config::kIsD256 ? 0 : w * keys);
      const int last = first + keys - 1;
      const Interval of_first = visible_queries(p, batch, segments.has_runs, first);
      const Interval of_last = visible_queries(p, batch, segments.has_runs, last);
      const bool exists = last < p.shape.key_length;
      by_all[w] = exists ? Interval{of_last.begin, of_first.end} : Interval{0, 0};
      if (!Config::kSumsQueries) by_some[w] = {of_first.begin, exists ? of_last.end : p.shape.query_length};
    }
    SegmentBlock keys = {};
    if (segments.has_ids) keys = p.segments.key_blocks[int64_t(batch) * schedule.key_tiles + key_tile];

    for (int base = 0; base < tiles.end - tiles.begin; base += 32) {
      const int tile = is_upward ? tiles.begin + base + lane : tiles.end - 1 - base - lane;
      bool is_visible = tiles.begin <= tile && tile < tiles.end;
      int flags = segments.has_runs ? kMaskedByRuns : 0;
      if (is_visible) {
        const int begin = tile * kTileQ, end = min(begin + kTileQ, p.shape.query_length);
        if (begin < by_all[0].begin || end > by_all[0].end) flags |= kMaskWarpgroup0;
        if (begin < by_all[1].begin || end > by_all[1].end) flags |= kMaskWarpgroup1;
        if (!Config::kSumsQueries) {
          if (end <= by_some[0].begin || begin >= by_some[0].end) flags |= kSkipWarpgroup0;
          if (end <= by_some[1].begin || begin >= by_some[1].end) flags |= kSkipWarpgroup1;
        }
        if (segments.has_ids) {
          const SegmentBlock queries = query_block<kTileQ>(p, schedule, batch, tile);
          is_visible = may_share_segment(queries, keys);
          if (!is_one_segment(queries, keys)) flags |= kMaskWarpgroup0 | kMaskWarpgroup1 | kMaskedByIds;
        }
      }
      for (unsigned found = __ballot_sync(kAllLanes, is_visible); found; found &= found - 1) {
        const int source = __ffs(found) - 1, flags_of_found = __shfl_sync(kAllLanes, flags, source);
        if (pending_tile >= 0) announce_heads(false);
        if (!Config::kSumsQueries && tiles.end - tiles.begin - base - source <= kTilesAhead) claim_next();
        pending_tile = __shfl_sync(kAllLanes, tile, source), pending_flags = flags_of_found;
      }
    }
    if (pending_tile < 0) {
      constexpr int kNothing = kMaskWarpgroup0 | kMaskWarpgroup1 | kSkipWarpgroup0 | kSkipWarpgroup1 | kAllMasked;
      pending_tile = 0, pending_flags = kNothing;
    }
    claim_next();
    announce_heads(true);
    pending_tile = -1;
  }

  // Not earlier than a few tiles before the end: a tile that is claimed but waits behind a long one holds up those that
  // must add to dQ after it.
  static constexpr int kTilesAhead = 4;
  __device__ __forceinline__ void claim_next() {
    if (lane != 0 || next_work >= 0) return;
    if constexpr (kIsRepair) {
      if (is_listed()) {
        next_work = s.repair.take(schedule.repair_list, schedule.work_tiles(), next_warpgroups);
        return;
      }
    }
    next_work = gridDim.x + atomicAdd(schedule.next_tile(), 1);
  }

  // Whether tiles are numbered as in the list.
  __device__ __forceinline__ bool is_listed() const { return kIsRepair && !repairs_all; }

  __device__ __forceinline__ void announce_heads(bool is_last_tile) {
    for (int i = 0; i < schedule.group_size; i++)
      announce(kv_head * schedule.group_size + i, is_last_tile && i == schedule.group_size - 1);
  }

  __device__ __forceinline__ void announce(int head, bool is_last) {
    using namespace ptx;
    const int flags = pending_flags | (is_last ? kLastOfTile : 0);
    const int64_t row = int64_t(batch) * p.shape.num_heads + head;
    uint64_t &q_full = s.q_full[ring.stage], &grad_out_full = s.grad_out_full[ring.stage];
    const float* g_stats =
        schedule.row_stats + row * schedule.stat_groups * kStatFloats + int64_t(pending_tile) * (2 * kTileQ);
    using Stats = std::conditional_t<Config::kSumsQueries, BlockStats<kTileQ>, OrdinaryStats>;
    const Stats stats(g_stats);  // they come while this waits for the consumers
    mbarrier_wait(s.q_empty[ring.stage], ring.parity ^ 1);
    if (lane == 0) {  // the copies first: the consumers wait for them before long
      const bool wants_ids = flags & kMaskedByIds;
      constexpr int kStatBytes = 2 * kTileQ * 4, kIdBytes = kTileQ * 4;
      mbarrier_expect(q_full, Config::kQueryBytes + kStatBytes + (wants_ids ? kIdBytes : 0));
      load_panels(&maps.q, q_full, shared_address(s.q[ring.stage]), kTileQ, pending_tile * kTileQ, head);
      bulk_load(q_full, shared_address(s.row_stats[ring.stage]), g_stats, kStatBytes);
      if (wants_ids) {
        bulk_load(q_full, shared_address(s.query_ids[ring.stage]),
                  p.segments.query_ids + int64_t(batch) * p.segments.pitch_query + pending_tile * kTileQ, kIdBytes);
      }
    }
    const int exceptional = stats.has_exceptional_rows() ? kExceptionalRows : 0;
    if (lane == 0) {
      const int dq_tile_row = int(row * schedule.dq_tile_rows) + pending_tile * Config::kDqTileRowsPerTile;
      s.block[ring.stage] = {pending_tile, flags & kAllMasked ? -1 : dq_tile_row, flags | exceptional,
                             static_cast<int>(row)};
      mbarrier_arrive(q_full);
    }
    mbarrier_wait(s.grad_out_empty[ring.stage], ring.parity ^ 1);
    if (lane == 0) {
      mbarrier_arrive_expect(grad_out_full, Config::kQueryBytes);
      load_panels(&maps.grad_out, grad_out_full, shared_address(s.grad_out[ring.stage]), kTileQ, pending_tile * kTileQ,
                  head);
    }
    ring.advance();
    if (!keys_are_loaded) load_keys();
    __syncwarp();
  }

  // K and V; behind the first queries, which need not wait for the tile before.
  __device__ __forceinline__ void load_keys() {
    using namespace ptx;
    const int buffer = key_ring.stage;
    uint64_t &k_full = s.k_full[buffer], &v_full = s.v_full[buffer];
    mbarrier_wait(s.v_empty[buffer], key_ring.parity ^ 1);
    if (lane == 0) {
      mbarrier_arrive_expect(v_full, Config::kKeyBytes);
      load_panels(&maps.v, v_full, shared_address(s.v[buffer]), kTileKv, key_tile * kTileKv, kv_head);
    }
    mbarrier_wait(s.k_empty[buffer], key_ring.parity ^ 1);
    if (lane == 0) {
      if constexpr (!Config::kSumsQueries)
        s.repair.take_stage(buffer, (batch * p.shape.num_kv_heads + kv_head) * schedule.key_tiles + key_tile,
                            schedule.repair_list);
      s.tile[buffer] = {key_tile, kv_head, batch, section, warpgroups};
      mbarrier_arrive_expect(k_full, Config::kKeyBytes);
      load_panels(&maps.k, k_full, shared_address(s.k[buffer]), kTileKv, key_tile * kTileKv, kv_head);
    }
    keys_are_loaded = true;
  }

  __device__ __forceinline__ void load_panels(const CUtensorMap* map, uint64_t& full, uint32_t s_panels, int rows,
                                              int token, int head) const {
#pragma unroll
    for (int panel = 0; panel < Config::kPanels; panel++) {
      ptx::tma_load_4d(map, full, s_panels + panel * rows * 128, panel * kPanelColumns, token, head, batch);
    }
  }
};

}  // namespace selfattn::cuda::sm90
