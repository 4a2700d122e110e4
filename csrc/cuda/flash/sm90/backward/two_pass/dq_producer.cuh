// The producer warp of the kernel for dQ: decides which key tiles a tile of queries meets, with which mask, and brings
// them in, behind the tile's Q, dO and O. Consumers follow what it announces and know no schedule.
#pragma once
#include "flash/sm90/backward/config.cuh"
#include "flash/sm90/backward/intervals.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"

namespace selfattn::cuda::sm90 {

struct DqMaps {
  CUtensorMap q, out, grad_out, k, v;  // boxes of 64 rows
  CUtensorMap grad_q;                  // of a warp's 16
};

// The producer warp: which key tiles a tile of queries meets, with which mask.
// kIsRepair: the second pass, over the tiles of the list.
template <class Config, bool kIsRepair>
struct KeyProducer {
  static constexpr int kTileQ = Config::kTileQ, kTileKv = Config::kTileKv;
  static constexpr unsigned kAllLanes = ~0u;

  const DqMaps& maps;
  const BackwardParams& p;
  const BackwardSchedule& schedule;
  typename Config::SharedStorage& s;
  int lane = threadIdx.x % 32;
  Ring<Config::kStages> ring = {};
  uint32_t tile_parity = 0;
  Ring<2> grad_out_ring = {};
  int next_work = -1;

  int batch = 0, head = 0, query_tile = 0;
  RowSegments segments = {};
  int pending_tile = -1, pending_flags = 0;

  __device__ __forceinline__ int tiles_of_head() const { return (p.shape.query_length + kTileQ - 1) / kTileQ; }

  __device__ __forceinline__ void run() {
    const int work_tiles = schedule.kv_groups * schedule.group_size * tiles_of_head();
    int work = blockIdx.x;
    if (kIsRepair) {
      claim_next();
      work = __shfl_sync(kAllLanes, next_work, 0);
      next_work = -1;
    }
    while (work < work_tiles) {
      take_tile(work);
      load_queries();
      produce_tile();
      work = __shfl_sync(kAllLanes, next_work, 0);
      next_work = -1;
      tile_parity ^= 1, grad_out_ring.advance();
    }
    ptx::mbarrier_wait(s.q_empty, tile_parity ^ 1);
    if (lane == 0) {
      s.tile.query_tile = -1;
      ptx::mbarrier_arrive(s.q_full);
    }
  }

  // Sections of heads one after another, in each the longest tiles of all heads first.
  __device__ __forceinline__ void take_tile(int work) {
    const int tiles = tiles_of_head(), tiles_of_section = schedule.kv_groups_per_section * schedule.group_size * tiles;
    const int section = work / tiles_of_section, rest = work % tiles_of_section, heads = schedule.heads_in(section);
    const int rank = rest / heads, row = kIsRepair ? work / tiles : schedule.first_head_of(section) + rest % heads;
    batch = row / p.shape.num_heads, head = row % p.shape.num_heads;
    segments = segments_of_row(p.segments, batch);
    query_tile = p.segments.mode ? p.segments.query_order[int64_t(batch) * tiles + rank] : tiles - 1 - rank;
    if (kIsRepair) query_tile = work % tiles;
  }

  __device__ __forceinline__ void load_queries() {
    using namespace ptx;
    uint64_t& full = s.q_full;
    mbarrier_wait(s.q_empty, tile_parity ^ 1);
    mbarrier_wait(s.grad_out_empty[grad_out_ring.stage], grad_out_ring.parity ^ 1);
    if (lane == 0) {
      s.repair.take_stage(grad_out_ring.stage, (batch * p.shape.num_heads + head) * tiles_of_head() + query_tile,
                          schedule.repair_list);
      const int first = query_tile * kTileQ;
      constexpr int kRowBytes = kTileQ * 4;
      s.tile = {query_tile, head, batch, segments.has_runs ? kContiguous : segments.has_ids ? kGeneral : -1};
      mbarrier_arrive_expect(full, 2 * Config::kQueryBytes + (segments.has_runs  ? 2 * kRowBytes
                                                              : segments.has_ids ? kRowBytes
                                                                                 : 0));
#pragma unroll
      for (int w = 0; w < 2; w++) {
        const int half = w * (Config::kQueryBytes / 2);
        load_panels(maps.q, full, s.q + half, first + w * 64, head);
        load_panels(maps.grad_out, full, s.grad_out[grad_out_ring.stage] + half, first + w * 64, head);
      }
      const int64_t at = int64_t(batch) * p.segments.pitch_query + first;
      if (segments.has_runs) {
        bulk_load(full, shared_address(s.rows[0]), p.segments.key_begin + at, kRowBytes);
        bulk_load(full, shared_address(s.rows[1]), p.segments.key_end + at, kRowBytes);
      } else if (segments.has_ids) {
        bulk_load(full, shared_address(s.rows[0]), p.segments.query_ids + at, kRowBytes);
      }
    }
    load_out();
  }

  // O of the first warpgroup in the memory of K, of the second in that of V.
  __device__ __forceinline__ void load_out() {
    using namespace ptx;
    static_assert(kTileKv == kTileQ / 2);
    const int stage = ring.stage;
    uint64_t &k_full = s.k_full[stage], &v_full = s.v_full[stage];
    mbarrier_wait(s.k_empty[stage], ring.parity ^ 1);
    mbarrier_wait(s.v_empty[stage], ring.parity ^ 1);
    if (lane == 0) {
      mbarrier_arrive_expect(k_full, Config::kKeyBytes), mbarrier_arrive_expect(v_full, Config::kKeyBytes);
      load_panels(maps.out, k_full, s.k[stage], query_tile * kTileQ, head);
      load_panels(maps.out, v_full, s.v[stage], query_tile * kTileQ + kTileQ / 2, head);
    }
    __syncwarp();
    ring.advance();
  }

  // 64 rows.
  __device__ __forceinline__ void load_panels(const CUtensorMap& map, uint64_t& full, unsigned char* s_panels, int row,
                                              int of_head) const {
#pragma unroll
    for (int panel = 0; panel < Config::kPanels; panel++)
      ptx::tma_load_4d(&map, full, ptx::shared_address(s_panels) + panel * (64 * 128), panel * kPanelColumns, row,
                       of_head, batch);
  }

  __device__ __forceinline__ void produce_tile() {
    // Keys that all (some) queries of a warpgroup see.
    Interval by_all[2], by_some[2];
#pragma unroll
    for (int w = 0; w < 2; w++) {
      const int first = query_tile * kTileQ + w * (kTileQ / 2), last = first + kTileQ / 2 - 1;
      const int end = p.shape.query_length - 1;
      const Interval of_first = visible_keys(p, batch, segments.has_runs, min(first, end)),
                     of_last = visible_keys(p, batch, segments.has_runs, min(last, end));
      by_all[w] = {of_last.begin, min(of_first.end, p.shape.key_length)};
      by_some[w] = first <= end ? Interval{of_first.begin, of_last.end} : Interval{0, 0};
    }
    // The second warpgroup's keys end where the tile's do, unless it has no queries.
    const int begin = by_some[0].begin, end = max(by_some[0].end, by_some[1].end);
    const int first_tile = begin / kTileKv, end_tile = begin < end ? (end + kTileKv - 1) / kTileKv : first_tile;
    SegmentBlock queries = {};
    if (segments.has_ids) queries = query_block<kTileQ>(p, schedule, batch, query_tile);
    for (int base = first_tile; base < end_tile; base += 32) {
      const int tile = base + lane;
      bool is_visible = tile < end_tile;
      int flags = 0;
      if (is_visible) {
        const int first = tile * kTileKv, behind = first + kTileKv;
#pragma unroll
        for (int w = 0; w < 2; w++) {
          if (first < by_all[w].begin || behind > by_all[w].end) flags |= kMaskWarpgroup0 << w;
          if (behind <= by_some[w].begin || first >= by_some[w].end) flags |= kSkipWarpgroup0 << w;
        }
        if (segments.has_ids) {
          const SegmentBlock keys =
              p.segments.key_blocks[int64_t(batch) * schedule.key_tiles + tile * kTileKv / kNarrowKeyBlock];
          is_visible = may_share_segment(queries, keys);
          if (!is_one_segment(queries, keys)) flags |= kMaskWarpgroup0 | kMaskWarpgroup1 | kMaskedByIds;
        }
      }
      for (unsigned found = __ballot_sync(kAllLanes, is_visible); found; found &= found - 1) {
        const int source = __ffs(found) - 1, flags_of_found = __shfl_sync(kAllLanes, flags, source);
        if (pending_tile >= 0) announce(0);
        if (end_tile - base - source <= kTilesAhead) claim_next();
        pending_tile = base + source, pending_flags = flags_of_found;
      }
    }
    if (pending_tile < 0) pending_tile = 0, pending_flags = kSkipWarpgroup0 | kSkipWarpgroup1;
    claim_next();
    announce(kLastOfTile);
    pending_tile = -1;
  }

  // Not earlier than a few tiles before the end: a tile that is claimed but waits behind a long one ends late.
  static constexpr int kTilesAhead = 4;
  __device__ __forceinline__ void claim_next() {
    if (lane != 0 || next_work >= 0) return;
    if (kIsRepair)
      next_work = s.repair.take(schedule.repair_list, schedule.kv_groups * schedule.group_size * tiles_of_head());
    else
      next_work = gridDim.x + atomicAdd(schedule.next_query_tile(), 1);
  }

  __device__ __forceinline__ void announce(int flag) {
    using namespace ptx;
    const int stage = ring.stage, kv_head = head / schedule.group_size, first = pending_tile * kTileKv;
    uint64_t &k_full = s.k_full[stage], &v_full = s.v_full[stage];
    mbarrier_wait(s.k_empty[stage], ring.parity ^ 1);
    if (lane == 0) {
      s.block[stage] = {pending_tile, pending_flags | flag};
      mbarrier_arrive_expect(k_full, Config::kKeyBytes);
      load_panels(maps.k, k_full, s.k[stage], first, kv_head);
    }
    mbarrier_wait(s.v_empty[stage], ring.parity ^ 1);
    if (lane == 0) {
      mbarrier_arrive_expect(v_full, Config::kKeyBytes);
      load_panels(maps.v, v_full, s.v[stage], first, kv_head);
    }
    __syncwarp();
    ring.advance();
  }
};

}  // namespace selfattn::cuda::sm90
