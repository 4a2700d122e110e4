// Who does what. Work is counted in units: kUnitKeys keys (split_keys, where they are given) of one tile of rows and
// one kv head, in the order (tile, kv head, keys), and each head tile, a tile with one kv head, counts `overhead` units
// more. Every thread block takes an equal share of that count, wherever its ends fall; where all tiles have the same
// count, whole head tiles, which nobody merges: those that stand side by side at the same time, since their keys lie
// side by side in memory. The count follows from the lengths, which are on the device alone; so each warp finds its
// thread block's share for itself, or reads what prepare.cu has left.
#pragma once
// The range checks of lengths, tables, ids and positions are part of the operator, not a debugging aid.
#undef NDEBUG
#include <cassert>
#include <climits>

#include "divisor.h"
#include "flash/tile/constants.h"
#include "flash/tile/softcap.cuh"
#include "flash/tile/window.h"
#include "params.h"
#include "ptx/launch.cuh"
#include "ptx/prefetch.cuh"

namespace selfattn::cuda::kv_cache {

// A tile of a row: pairs (token of the row, head of the group) first .. first + count - 1.
struct TileEntry {
  int row;          // of the cache
  int first;        // a multiple of the tile's rows
  int first_token;  // where the row's tokens begin in token_order
  int tokens;       // of the row
};

// Where a share begins: the tile, and the count up to it.
struct ShareStart {
  int tile, count;
};

struct ShareTotals {
  int all;      // the count of all tiles
  int of_tile;  // where it is the same in all, or 0
};

struct ScheduleParams {
  int tile_rows;               // of kernel
  Divisor group;               // heads that share a kv head
  Divisor queries, page_size;  // of the call
  int tiles;                   // at most
  Divisor tiles_per_row;       // without ids
  Divisor unit_keys;
  int overhead;
  int thread_blocks;         // the grid
  int cluster_blocks;        // of each cluster; 0: the grid is none of clusters, and has shares
  bool is_level;             // clusters, whatever the lengths
  int splits_per_head_tile;  // with split_keys: places for partial results of a head tile; else 0

  // Written by prepare_kv_cache_kernel.
  int* counters;     // (thread_blocks) zeros
  bool is_prepared;  // whether what follows is filled, too
  ShareTotals* totals;
  ShareStart* starts;                // (thread_blocks)
  TileEntry* entries;                // (tiles), with ids
  int* token_order;                  // (batch * queries) tokens of all rows, by row, with ids
  int *token_counts, *token_starts;  // (rows + 1), with ids; token_starts for prepare alone
  int* tile_counts_before;           // (tiles), for prepare alone
};

// Keys or values of the cache, as TensorView.
struct CacheSource {
  const uint16_t* data;
  int64_t stride_page, stride_token, stride_head;
  int dim;
};

struct KernelParams {
  KvCacheParams call;
  CacheSource caches[2];  // call.k, call.v
  ScheduleParams schedule;
  float2* partial_stats;  // (partial results, tile_rows)
  float* partial_out;     // (partial results, tile_rows, kDim)
  int stages;             // of the rings
  Softcap softcap;
};

// By so many threads, a word each.
template <class Value>
__device__ __forceinline__ void copy_words(const Value& source, Value& target, int thread, int threads) {
  static_assert(sizeof(Value) % sizeof(int) == 0);
#pragma unroll 1
  for (int i = thread; i < int(sizeof(Value) / sizeof(int)); i += threads)
    reinterpret_cast<int*>(&target)[i] = reinterpret_cast<const int*>(&source)[i];
}

// Of one row of a tile.
struct QueryRow {
  int batch, index;  // in q
  int head;          // of the group
  int token;         // of the row
};

struct Tile {
  TileEntry entry;
  int count;      // of its rows
  int length;     // of its keys
  Interval keys;  // in reach of some row
  int units_before, units;

  __device__ __forceinline__ QueryRow query(const KernelParams& p, int tile_row) const {
    const int pair = entry.first + tile_row, token = pair / p.schedule.group,
              head = pair - token * p.schedule.group.value;
    if (!p.call.segment_ids) return {entry.row, token, head, token};
    const int place = p.schedule.token_order[entry.first_token + token], batch = place / p.schedule.queries;
    return {batch, place - batch * p.call.queries, head, token};
  }
  __device__ __forceinline__ int position(const KernelParams& p, const QueryRow& query) const {
    if (!p.call.positions) return length - entry.tokens + query.token;
    const int64_t position = p.call.positions.at(query.batch, query.index);
    assert(position == static_cast<int>(position) && "positions must fit in int32");
    return static_cast<int>(position);
  }
};

// What a row of a tile may see.
struct VisibleKeys {
  Interval keys;    // without those that the draft mask is about
  uint32_t drafts;  // bit i: key first_draft + i
  int first_draft;

  __device__ __forceinline__ bool has(int key) const {
    const unsigned draft = static_cast<unsigned>(key - first_draft);
    return (key >= keys.begin && key < keys.end) || (draft < kMaxDraft && (drafts >> draft & 1));
  }
};

// By causality and the window; `drafts`: by the window alone. A query at a negative position sees nothing.
__device__ __forceinline__ Interval visible_interval(const KvCacheParams& call, int position, int length,
                                                     bool drafts = false) {
  const int right = call.is_causal && !drafts ? 0 : call.window.right;
  return slots_of_query({call.window.left, right}, position, length);
}

inline __device__ __noinline__ VisibleKeys visible_keys(const KernelParams& p, const Tile& tile, int tile_row) {
  const KvCacheParams& call = p.call;
  const QueryRow query = tile.query(p, tile_row);
  const int position = tile.position(p, query);
  VisibleKeys visible{visible_interval(call, position, tile.length), 0, tile.length};
  if (call.draft_mask) {
    const Interval reach = visible_interval(call, position, tile.length, true);
    visible.first_draft = tile.length - call.queries;
    // A window may begin behind the first draft; what is left is empty then, and no less.
    visible.keys.end = ::max(visible.keys.begin, ::min(visible.keys.end, visible.first_draft));
    const bool* g_mask = call.draft_mask + (int64_t(query.batch) * call.queries + query.index) * call.queries;
#pragma unroll 1
    for (int i = 0; i < call.queries; i++) {
      const int key = visible.first_draft + i;
      if (g_mask[i] && key >= reach.begin && key < reach.end) visible.drafts |= 1u << i;
    }
  }
  return visible;
}

// Whether some row of the tile may see one of the keys.
inline __device__ __noinline__ bool is_wanted(const KernelParams& p, const Tile& tile, const Interval& keys) {
#pragma unroll 1
  for (int row = 0; row < tile.count; row++) {
    const VisibleKeys visible = visible_keys(p, tile, row);
#pragma unroll 1
    for (int key = keys.begin; key < keys.end; key++)
      if (visible.has(key)) return true;
  }
  return false;
}

__device__ __forceinline__ TileEntry find_entry(const KernelParams& p, int tile) {
  if (p.call.segment_ids) return p.schedule.entries[tile];
  const int row = tile / p.schedule.tiles_per_row;
  return {row, (tile - row * p.schedule.tiles_per_row.value) * p.schedule.tile_rows, 0, p.call.queries};
}

__device__ __forceinline__ int rows_of(const KernelParams& p, const TileEntry& entry) {
  return ::min(p.schedule.tile_rows, entry.tokens * p.schedule.group.value - entry.first);
}

__device__ __forceinline__ int read_length(const KvCacheParams& call, int row) {
  const int64_t length = call.lengths.at(row, 0);
  assert(length >= 0 && length <= int64_t(call.page_size) * call.pages_per_row && "lengths must fit the cache");
  return static_cast<int>(length);
}

// By a whole warp, of few rows: they come from memory while the code that asks for them does.
__device__ __forceinline__ void prefetch_lengths(const KvCacheParams& call) {
  constexpr int kStep = 32 / sizeof(int64_t);  // a sector or two
  const int row = static_cast<int>(threadIdx.x) % kWarpSize * kStep;
  if (row < call.rows) ptx::prefetch_to_l2(call.lengths.place(row, 0));
}

inline __device__ __noinline__ Tile describe_tile(const KernelParams& p, const TileEntry& entry, int length) {
  const KvCacheParams& call = p.call;
  Tile tile;
  tile.entry = entry;
  tile.count = rows_of(p, tile.entry);
  tile.length = length;
  const int first = tile.entry.first / p.schedule.group, last = (tile.entry.first + tile.count - 1) / p.schedule.group;
  int lowest = tile.length - tile.entry.tokens + first, highest = lowest + last - first;
  if (call.positions) {
    lowest = INT_MAX, highest = INT_MIN;
#pragma unroll 1
    for (int token = first; token <= last; token++) {
      const int position = tile.position(p, tile.query(p, token * p.schedule.group.value - tile.entry.first));
      lowest = ::min(lowest, position), highest = ::max(highest, position);
    }
  }
  tile.keys = {visible_interval(call, ::max(lowest, 0), tile.length).begin,
               visible_interval(call, highest, tile.length, call.draft_mask != nullptr).end};
  if (tile.keys.end <= tile.keys.begin) tile.keys = {0, 0};
  const Divisor& unit_keys = p.schedule.unit_keys;
  tile.units_before = tile.keys.begin / unit_keys;
  // A tile without keys has one unit, too: somebody must write its zeros.
  tile.units = ::max((tile.keys.end + unit_keys.value - 1) / unit_keys - tile.units_before, 1);
  return tile;
}

__device__ __forceinline__ Tile describe_tile(const KernelParams& p, int index) {
  const TileEntry entry = find_entry(p, index);
  return describe_tile(p, entry, read_length(p.call, entry.row));
}

__device__ __forceinline__ int count_of(const KernelParams& p, const Tile& tile) {
  return (tile.units + p.schedule.overhead) * p.call.num_kv_heads;
}

// The share of a thread block. The first `longer` of them have one unit more than `least`.
struct Share {
  int begin, end;
  ShareStart start;
  int least, longer;
  int stride;  // of whole head tiles begin, begin + stride .. up to end: these are their numbers; 0: units

  __device__ __forceinline__ int begin_of(int part) const { return part * least + ::min(part, longer); }
  // Which thread block has a unit.
  __device__ __noinline__ int owner(int unit) const {
    const int units_of_longer = longer * (least + 1);
    return unit < units_of_longer ? unit / (least + 1) : longer + (unit - units_of_longer) / least;
  }
};

// count: of each tile, where it is the same in all, or 0. Few thread blocks less do no harm, since one takes more from
// memory than its share.
__device__ __forceinline__ Share cut_share(const KernelParams& p, int total, int count, int part) {
  Share share{};
  const int parts = ::max(::min(p.schedule.thread_blocks, total), 1);
  if (count > 0 && !p.call.split_keys) {
    const int head_tiles = total / count * p.call.num_kv_heads, each = (head_tiles + parts - 1) / parts;
    const int takers = (head_tiles + each - 1) / each;
    if (4 * takers >= 3 * parts) {
      share.stride = takers, share.begin = ::min(part, takers), share.end = part < takers ? head_tiles : share.begin;
      return share;
    }
  }
  share.least = total / parts, share.longer = total - parts * share.least;
  if (part < parts) share.begin = share.begin_of(part), share.end = share.begin_of(part + 1);
  return share;
}

// So many tiles does each warp count for itself.
constexpr int kMaxTilesOfWarp = 8 * kWarpSize;

// By a whole warp.
inline __device__ __noinline__ Share find_share(const KernelParams& p) {
  const int part = static_cast<int>(blockIdx.x), lane = static_cast<int>(threadIdx.x) % kWarpSize;
  if (p.schedule.is_prepared) {
    Share share = cut_share(p, p.schedule.totals->all, p.schedule.totals->of_tile, part);
    if (share.begin < share.end && share.stride == 0) share.start = p.schedule.starts[part];
    return share;
  }
  const int per_lane = (p.schedule.tiles + kWarpSize - 1) / kWarpSize;
  const int first_tile = lane * per_lane, last_tile = ::min(first_tile + per_lane, p.schedule.tiles);
  int sum = 0, least = INT_MAX, most = 0;
#pragma unroll 1
  for (int tile = first_tile; tile < last_tile; tile++) {
    const int count = count_of(p, describe_tile(p, tile));
    sum += count, least = ::min(least, count), most = ::max(most, count);
  }
  least = __reduce_min_sync(~0u, least), most = __reduce_max_sync(~0u, most);
  int up_to = sum;  // this lane's tiles included
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int before = __shfl_up_sync(~0u, up_to, distance);
    if (lane >= distance) up_to += before;
  }
  Share share = cut_share(p, __shfl_sync(~0u, up_to, kWarpSize - 1), least == most ? most : 0, part);
  if (share.stride > 0) return share;
  // Of the lanes whose tiles end behind the beginning the first has it.
  const unsigned ends_behind = __ballot_sync(~0u, up_to > share.begin);
  const int source = ends_behind ? __ffs(ends_behind) - 1 : 0;
  share.start = {__shfl_sync(~0u, first_tile, source), __shfl_sync(~0u, up_to - sum, source)};
#pragma unroll 1
  for (int i = 1; i < per_lane; i++) {
    const int next = share.start.count + count_of(p, describe_tile(p, share.start.tile));
    if (next > share.begin) break;
    share.start = {share.start.tile + 1, next};
  }
  return share;
}

// Keys of one head tile that are done in one go.
struct Piece {
  Interval keys;
  int kv_head;
  int first_unit, units;  // of the head tile's
  bool ends_part;         // the last piece of the head tile in this thread block
};

// Goes through the pieces of a share: in shared memory, one for each warp and purpose, so that its code is there once.
struct Walk {
  Tile tile;
  Piece piece;  // found last
  int next, tile_index, kv_head;
  int head_tile_start;  // what is counted before the head tile

  __device__ __forceinline__ bool is_whole() const { return piece.units == tile.units; }
};

__device__ __forceinline__ Walk begin_walk(const Share& share) {
  Walk walk{};
  walk.next = share.begin, walk.tile_index = share.start.tile, walk.head_tile_start = share.start.count;
  walk.kv_head = -1;
  return walk;
}

// By a whole warp, each of which finds its thread block's share, and the pieces of it, for itself.
__device__ __forceinline__ void begin_share(const KernelParams& p, Share& s_share, Walk& s_walk) {
  if (p.schedule.is_prepared)
    ptx::wait_for_previous_kernel();  // its schedule is there
  else
    prefetch_lengths(p.call);
  const Share found = find_share(p);
  if (threadIdx.x % kWarpSize == 0) s_share = found, s_walk = begin_walk(found);
  __syncwarp();
}

// By a whole warp. Whether there is one more piece, which is then walk.piece.
inline __device__ __noinline__ bool find_next(const KernelParams& p, const Share& share, Walk& s_walk) {
  const int overhead = p.schedule.overhead;
  Walk walk = s_walk;
  bool is_found = false;
  if (share.stride > 0 && walk.next < share.end) {
    walk.tile_index = walk.next / p.call.num_kv_heads;
    walk.kv_head = walk.next - walk.tile_index * p.call.num_kv_heads;
    walk.tile = describe_tile(p, walk.tile_index);
    walk.piece = {walk.tile.keys, walk.kv_head, 0, walk.tile.units, true};
    walk.next += share.stride;
    is_found = true;
  }
  while (share.stride == 0 && !is_found && walk.next < share.end) {
    if (walk.kv_head < 0) {
      walk.tile = describe_tile(p, walk.tile_index);
      const int length = walk.tile.units + overhead;
      walk.kv_head = (walk.next - walk.head_tile_start) / length;
      walk.head_tile_start += walk.kv_head * length;
    } else if (walk.next == walk.head_tile_start + walk.tile.units + overhead) {
      walk.head_tile_start = walk.next;
      if (++walk.kv_head == p.call.num_kv_heads) walk.kv_head = 0, walk.tile = describe_tile(p, ++walk.tile_index);
    }
    const int units_start = walk.head_tile_start + overhead, units_end = units_start + walk.tile.units;
    const int part_end = ::min(share.end, units_end), begin = ::max(walk.next, units_start);
    const int end = p.call.split_keys ? ::min(begin + 1, part_end) : part_end;
    walk.next = ::max(end, ::min(begin, part_end));
    is_found = begin < end;  // else there is nothing but overhead
    Piece& piece = walk.piece;
    piece.first_unit = begin - units_start, piece.units = end - begin;
    const int unit_keys = p.schedule.unit_keys.value;
    const int first_key = (walk.tile.units_before + piece.first_unit) * unit_keys;
    piece.keys = walk.tile.keys & Interval{first_key, first_key + piece.units * unit_keys};
    piece.kv_head = walk.kv_head, piece.ends_part = end == part_end;
  }
  __syncwarp();
  if (threadIdx.x % kWarpSize == 0) s_walk = walk;
  __syncwarp();
  return is_found;
}

}  // namespace selfattn::cuda::kv_cache
