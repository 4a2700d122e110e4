// The producer warp of the forward kernel: takes tiles, finds the key blocks they need, and feeds Q, K and V.
#pragma once
#include "flash/sm90/pipeline.cuh"
#include "flash/tile/key_blocks.cuh"
#include "flash/tile/mask.cuh"
#include "params.cuh"
#include "ptx/launch.cuh"
#include "ptx/tma.cuh"
#include "repair.cuh"

namespace selfattn::cuda::sm90 {

// The last key block that the window lets query tile `index` see.
template <class Config>
__device__ __forceinline__ int last_block_in_window(const ForwardKernelParams& p, int index) {
  const int last_row = min((index + 1) * Config::kTileQuery, p.shape.query_length) - 1;
  const int end = keys_of_query(p.window, last_row, p.shape.key_length - p.shape.query_length, p.shape.key_length).end;
  return max(end - 1, 0) / Config::kTileKey;
}

// The tile of a number and the range of key blocks in reach of its rows; returns the keys in reach. All lanes write the
// same. The first pass counts the schedule, the repair counts as its list does.
template <class Config, bool kIsRepair>
__device__ __forceinline__ Interval describe_tile(const ForwardKernelParams& p, int number, QueryTile& s_tile) {
  const int tiles = p.schedule.tiles_per_head;
  const TilePlace place = kIsRepair ? TilePlace{number / tiles, 0, false} : find_tile(p.schedule, number);
  const int b = place.head / p.shape.num_heads;
  QueryTile tile{place.rank, place.head, 0, 0, kNoSegments};
  if (Config::kMask == MaskKind::kCausal) tile.index = tiles - 1 - place.rank;
  if (Config::kMask == MaskKind::kMasked) {
    if (p.segments.mode) {
      tile.mode = p.segments.mode[b];
      if (place.is_last_section) tile.index = p.segments.order[b * tiles + place.rank];
    } else if (p.window.right < AttentionWindow::kUnbounded)
      tile.index = tiles - 1 - place.rank;
  }
  if (kIsRepair) tile.index = number % tiles;
  const int first_row = tile.index * Config::kTileQuery, offset = p.shape.key_length - p.shape.query_length;
  const int last_row = min(first_row + Config::kTileQuery, p.shape.query_length) - 1;
  Interval keys{0, p.shape.key_length};
  if (Config::kMask != MaskKind::kFull) {
    keys.end = keys_of_query(p.window, last_row, offset, p.shape.key_length).end;
  }
  if (Config::kMask == MaskKind::kMasked) {
    keys.begin = keys_of_query(p.window, first_row, offset, p.shape.key_length).begin;
    if (tile.mode == kContiguous) {
      const int row = b * p.segments.pitch_query;
      keys = keys & Interval{p.segments.key_begin[row + first_row], p.segments.key_end[row + last_row]};
    }
  }
  // A tile that sees no key still visits one block, all masked: it has rows to write.
  const int last_block = (p.shape.key_length - 1) / Config::kTileKey;
  tile.first_block = min(max(keys.begin, 0) / Config::kTileKey, last_block);
  tile.end_block = max((keys.end + Config::kTileKey - 1) / Config::kTileKey, tile.first_block + 1);
  s_tile = tile;
  __syncwarp();
  return keys;
}

// By one lane: the rows of a tile, into a stage, and what is told about them.
template <class Config>
__device__ __forceinline__ void copy_query(const ForwardKernelParams& p, typename Config::SharedStorage& s, int stage,
                                           int index, int b, int h) {
  for (int w = 0; w < Config::kWarpgroups; w++)
    for (int panel = 0; panel < Config::kPanelsQk; panel++)
      ptx::tma_load_4d(&p.query, s.q_full[stage], ptx::shared_address(s.q[stage][w]) + panel * Config::kQueryPanelBytes,
                       panel * kPanelColumns, index * Config::kTileQuery + w * kWarpgroupRows, h, b);
}
template <class Config>
__device__ __forceinline__ void announce_query(const ForwardKernelParams& p, typename Config::SharedStorage& s,
                                               int stage, const QueryTile& tile, int b) {
  constexpr bool kMasked = Config::kMask == MaskKind::kMasked;
  s.tile[stage] = tile;
  const int tables = !kMasked ? 0 : tile.mode == kContiguous ? 2 : tile.mode == kGeneral ? 1 : 0;
  ptx::mbarrier_arrive_expect(s.q_full[stage], Config::kQueryBytes + tables * Config::kTableBytes);
  const size_t at = size_t(b) * p.segments.pitch_query + tile.index * Config::kTileQuery;
  const auto copy_table = [&](int which, const int* g_table) {
    ptx::bulk_load(s.q_full[stage], ptx::shared_address(s.row_table[stage][which]), g_table + at, Config::kTableBytes);
  };
  if (tables > 0) copy_table(0, tile.mode == kContiguous ? p.segments.key_begin : p.segments.query_ids);
  if (tables > 1) copy_table(1, p.segments.key_end);
}

// The number of the next tile, taken late: a tile reserved behind a long one is what the other thread blocks would wait
// for.
template <class Config, bool kIsRepair>
__device__ __forceinline__ int take_tile(const ForwardKernelParams& p, typename Config::SharedStorage& s) {
  if (kIsRepair) return s.repair.take(p.repair_list, p.schedule.tiles);
  return p.counters ? gridDim.x + atomicAdd(p.counters, 1) : p.schedule.tiles;
}

// The end of the work, by one lane.
template <class Config>
__device__ __forceinline__ void announce_end(typename Config::SharedStorage& s, const Ring<Config::kQueryStages>& q) {
  ptx::mbarrier_wait(s.q_empty[q.stage], q.parity ^ 1);
  s.tile[q.stage].index = -1;
  ptx::mbarrier_arrive(s.q_full[q.stage]);
}

// The whole warp walks together; lane 0 issues.
template <class Config, bool kIsRepair>
__device__ __forceinline__ void load_tiles(const ForwardKernelParams& p, typename Config::SharedStorage& s) {
  constexpr bool kMasked = Config::kMask == MaskKind::kMasked;
  const int lane = threadIdx.x % kWarpSize, group = p.shape.num_heads / p.shape.num_kv_heads;
  Ring<Config::kQueryStages> q;
  Ring<Config::kKeyStages> k;
  Ring<Config::kValueStages> v;

  const auto copy_key = [&](int index, int b, int h) {
    for (int panel = 0; panel < Config::kPanelsQk; panel++)
      ptx::tma_load_4d(&p.key, s.k_full[k.stage], ptx::shared_address(s.k[k.stage]) + panel * Config::kKeyPanelBytes,
                       panel * kPanelColumns, index * Config::kTileKey, h, b);
  };
  const auto announce_key = [&](const KeyBlock& block) {
    if (kMasked) s.block_message[k.stage] = block.encode();
    ptx::mbarrier_arrive_expect(s.k_full[k.stage], Config::kKeyBytes);
  };
  // V lags one block behind K, across tiles too: the order of use.
  int value_block = -1, value_b = 0, value_h = 0;
  const auto load_value = [&] {
    if (value_block < 0) return;
    ptx::mbarrier_wait(s.v_empty[v.stage], v.parity ^ 1);
    ptx::mbarrier_arrive_expect(s.v_full[v.stage], Config::kValueBytes);
    for (int panel = 0; panel < Config::kPanelsV; panel++)
      ptx::tma_load_4d(&p.value, s.v_full[v.stage], ptx::shared_address(s.v[v.stage]) + panel * Config::kKeyPanelBytes,
                       panel * kPanelColumns, value_block * Config::kTileKey, value_h, value_b);
    v.advance();
  };
  int number = blockIdx.x, early_block = -1;
  if (kIsRepair) number = __shfl_sync(~0u, lane == 0 ? s.repair.take(p.repair_list, p.schedule.tiles) : 0, 0);
  if constexpr (kMasked && !kIsRepair) {
    // Under a causal mask the first tile and its rightmost block are known before the kernel ahead has made the tables.
    const TilePlace place = find_tile(p.schedule, number);
    if (p.segments.mode && p.window.right == 0 && !place.is_last_section) {
      const int b = place.head / p.shape.num_heads, h = place.head % p.shape.num_heads;
      early_block = last_block_in_window<Config>(p, place.rank);
      if (lane == 0) copy_query<Config>(p, s, q.stage, place.rank, b, h), copy_key(early_block, b, h / group);
    }
    ptx::wait_for_previous_kernel();
  }
  if (number < p.schedule.tiles) describe_tile<Config, kIsRepair>(p, number, s.upcoming);
  // Loads the tiles in the order of use: K_n, (Q), V_{n+1}, ...
  while (number < p.schedule.tiles) {
    const QueryTile tile = s.upcoming;
    const int b = tile.head / p.shape.num_heads, h = tile.head % p.shape.num_heads, kv_head = h / group;
    const bool by_ids = kMasked && tile.mode == kGeneral;
    const auto test = [&](int index, bool& meets, bool& is_uniform) {
      if (!by_ids) {  // where the block loaded early lies apart from those in reach, none of those between is visited
        meets = tile.first_block <= index && index < tile.end_block;
        return;
      }
      const SegmentBlock queries = p.segments.query_blocks[size_t(b) * p.segments.query_tiles + tile.index],
                         keys = p.segments.key_blocks[size_t(b) * p.segments.key_tiles + index];
      meets = may_share_segment(queries, keys), is_uniform = is_one_segment(queries, keys);
    };
    const int first_block = early_block < 0 ? tile.first_block : min(tile.first_block, early_block);
    KeyBlockWalk walk(first_block, max(tile.end_block, early_block + 1), early_block);
    KeyBlock block{tile.end_block - 1, false, by_ids}, next;
    walk.find_next(block, test);  // or the block above stands: nothing in reach, all masked
#pragma unroll 1
    for (bool is_first = true;; is_first = false) {
      block.is_last = !walk.find_next(next, test);
      if (lane == 0) {
        if (block.is_last) number = take_tile<Config, kIsRepair>(p, s);
        const bool is_copied = is_first && early_block >= 0;
        if (!is_copied) ptx::mbarrier_wait(s.k_empty[k.stage], k.parity ^ 1);
        announce_key(block);
        if (!is_copied) copy_key(block.index, b, kv_head);
        load_value();
        value_block = block.index, value_b = b, value_h = kv_head;
        if (is_first) {
          if (!is_copied) ptx::mbarrier_wait(s.q_empty[q.stage], q.parity ^ 1);
          s.repair.take_stage(q.stage, tile.head * p.schedule.tiles_per_head + tile.index, p.repair_list);
          announce_query<Config>(p, s, q.stage, tile, b);
          if (!is_copied) copy_query<Config>(p, s, q.stage, tile.index, b, h);
          q.advance();
        }
      }
      k.advance();
      if (block.is_last) break;
      block.index = next.index, block.by_ids = next.by_ids;
    }
    early_block = -1;
    number = __shfl_sync(~0u, number, 0);
    if (number < p.schedule.tiles) describe_tile<Config, kIsRepair>(p, number, s.upcoming);
  }
  if (lane == 0) {
    load_value();
    announce_end<Config>(s, q);
  }
}

}  // namespace selfattn::cuda::sm90
