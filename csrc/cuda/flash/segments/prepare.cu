#include "tables.h"

// The range check of int64 ids is part of the operator, not a debugging aid.
#undef NDEBUG
#include <cuda_runtime.h>

#include <algorithm>

#include "cache_row.cuh"
#include "flash/params.h"
#include "flash/tile/window.h"
#include "host/carver.h"
#include "host/device.h"
#include "ordered_row.cuh"
#include "ptx/launch.cuh"
#include "run_table.cuh"
#include "runs.cuh"

namespace selfattn::cuda {
namespace {

// The thread blocks of a batch row all find the runs of the whole row, so that none waits for another, and then share
// what is to be written.
constexpr int kWarps = SegmentRuns::kWarps, kThreads = kWarps * kWarpSize;
constexpr int kMaxBlocks = 32;                     // a row
constexpr int kMaxGrid = 132;                      // thread blocks, if rows share them; of more rows each gets one
constexpr int kMaxTiles = kMaxSegmentLength / 64;  // a row; a tile's cost and its number share 31 bits
static_assert(int64_t(kMaxCacheCapacity / 64 + 1) * kMaxTiles <= INT_MAX);

__host__ __device__ int count_tiles(int length, int tile) { return (length + tile - 1) / tile; }
__host__ __device__ int round_up(int value, int multiple) { return count_tiles(value, multiple) * multiple; }

// Where a thread stands among those that share a piece of work.
struct Share {
  int block, blocks;

  __device__ int thread() const { return block * kThreads + threadIdx.x; }
  __device__ int threads() const { return blocks * kThreads; }
  __device__ int warp() const { return block * kWarps + warp_of_thread(); }
  __device__ int warps() const { return blocks * kWarps; }
};

// A batch row in any order: its ids, and, if they are looked for, its runs in shared memory. With one side both share
// what is here.
template <class Id, int kSideCount>
struct Row : RowIds<Id, kSideCount> {
  static constexpr bool kMayBeGeneral = true;

  unsigned* s_runs;
  RunTable table;

  // `table_at`: of the table of runs, in words of `storage`, of that many slots.
  __device__ Row(const SegmentProblem& p, int64_t b, unsigned* storage, int table_at, int slots)
      : RowIds<Id, kSideCount>{p, b}, s_runs(storage), table(reinterpret_cast<int*>(storage) + table_at, slots) {}

  using RowIds<Id, kSideCount>::p, RowIds<Id, kSideCount>::kSides, RowIds<Id, kSideCount>::length,
      RowIds<Id, kSideCount>::ids;

  __device__ __forceinline__ SegmentRuns runs(int side) const {
    const bool are_keys = kSides == 2 && side == kKeySide;
    return {s_runs + (are_keys ? SegmentRuns::storage_words(p.query_length) : 0), length(side)};
  }

  // Whether the other side's tokens of a token's segment are an interval, of all tokens.
  __device__ __forceinline__ bool find_intervals() const {
    bool increases = false;
#pragma unroll 1
    for (int side = 0; side < kSides; side++) increases = runs(side).find(ids(side));
    if constexpr (kSides == 1)
      return increases || table.template fill<1>(*this);
    else
      return table.template fill<2>(*this) && match_runs();
  }

  // That interval. Where a token has none it is empty, between those of the tokens around it.
  __device__ __forceinline__ Interval interval(int side, int token) const {
    const SegmentRuns mine = runs(side);
    if (kSides == 1) return {mine.begin(token), mine.end(token)};
    const int start = mine.last_kept(token);
    if (start < 0) return {0, 0};
    const int other = partner(side, start), end = runs(1 - side).end_of_kept(other);
    return {token < mine.end_of_kept(start) ? other : end, end};
  }

 private:
  // Where the run of the same id starts on the other side; negative if there is none.
  __device__ __forceinline__ int partner(int side, int start) const { return table.find(ids(side)[start], 1 - side); }

  // Keeps the runs whose ids both sides have. Returns whether these come in the same order on both.
  __device__ __forceinline__ bool match_runs() const {
#pragma unroll 1
    for (int side = 0; side < 2; side++) runs(side).keep([&](int start) { return partner(side, start) >= 0; });
    const SegmentRuns queries = runs(kQuerySide);
    bool falls = false;
    queries.visit_starts([&](int start) {
      const int before = start > 0 ? queries.last_kept(start - 1) : -1;
      if (before >= 0) falls |= partner(kQuerySide, before) > partner(kQuerySide, start);
    });
    return !__syncthreads_or(falls);
  }
};

// Of a contiguous row. What lies past the end gets [length, length) of the other side.
template <class Row>
__device__ void write_intervals(const Share& share, const Row& row, int side, int pitch, int* g_begin, int* g_end) {
  const int length = row.length(side), other_length = row.length(1 - side);
#pragma unroll 1
  for (int token = share.thread(); token < pitch; token += share.threads()) {
    Interval interval{other_length, other_length};
    if (token < length) interval = row.interval(side, token);
    g_begin[token] = interval.begin, g_end[token] = interval.end;
  }
}

template <class Id>
__device__ void write_ids(const Share& share, const IdRow<Id>& ids, int padding, int pitch, int* g_ids) {
#pragma unroll 1
  for (int token = share.thread(); token < pitch; token += share.threads()) {
    const int id = token < ids.length ? ids[token] : -1;
    g_ids[token] = id < 0 ? padding : id;
  }
}

__device__ uint64_t signature_bit(int id) { return uint64_t(1) << (static_cast<unsigned>(id) * 0x9E3779B1u >> 26); }

// By one warp. A block that holds one id and padding is made to look like two ids: uniform means unmasked.
template <class Id>
__device__ void write_block(const IdRow<Id>& ids, int tile, int block, SegmentBlock* g_blocks) {
  const int lane = lane_of_thread();
  int min_id = INT_MAX, max_id = INT_MIN;
  unsigned low = 0, high = 0;
  bool has_padding = false;
#pragma unroll 1
  for (int token = block * tile + lane; token < min((block + 1) * tile, ids.length); token += kWarpSize) {
    const int id = ids[token];
    if (id < 0) {
      has_padding = true;
      continue;
    }
    min_id = min(min_id, id), max_id = max(max_id, id);
    low |= static_cast<unsigned>(signature_bit(id)), high |= static_cast<unsigned>(signature_bit(id) >> 32);
  }
  min_id = __reduce_min_sync(kAllLanes, min_id), max_id = __reduce_max_sync(kAllLanes, max_id);
  low = __reduce_or_sync(kAllLanes, low), high = __reduce_or_sync(kAllLanes, high);
  if (__any_sync(kAllLanes, has_padding) && min_id == max_id) max_id < INT_MAX ? max_id++ : min_id--;
  if (lane == 0) g_blocks[block] = {min_id, max_id, static_cast<uint64_t>(high) << 32 | low};
}

// How many tiles of the other side tile `tile` has to visit, by intervals (if there are any) and the window.
template <class Row>
__device__ int tile_cost(const SegmentProblem& p, bool of_queries, int size, int tile, bool is_contiguous,
                         const Row& row) {
  const int offset = p.key_length - p.query_length;
  const int other_size = of_queries ? p.key_tile : p.query_tile;
  const int length = of_queries ? p.query_length : p.key_length,
            other_length = of_queries ? p.key_length : p.query_length;
  const int first = tile * size, last = min(first + size, length) - 1;
  // Query i sees keys i + offset - left .. i + offset + right; key j is seen by queries j - offset - right .. j -
  // offset + left.
  const int before = of_queries ? p.window_left - offset : p.window_right + offset;
  const int after = of_queries ? p.window_right + offset : p.window_left - offset;
  int begin = max(first - before, 0), end = min(last + 1 + after, other_length);
  if (is_contiguous) {
    const int side = of_queries ? kQuerySide : kKeySide;
    begin = max(begin, row.interval(side, first).begin), end = min(end, row.interval(side, last).end);
  }
  return end > begin ? (end - 1) / other_size - begin / other_size + 1 : 0;
}

// Higher cost first, then lower number. Sorting keys are looked at four a lane; those past the last tile come last.
constexpr int kKeysPerLane = 4, kNoKey = -1;
__device__ int sorting_key(int cost, int tile) { return cost * kMaxTiles + kMaxTiles - 1 - tile; }
__device__ int cost_of_key(int key) { return key / kMaxTiles; }

// By one warp.
__device__ void write_computed_blocks(int tiles, const int* s_keys, int* g_computed_blocks) {
  int computed_blocks = 0;
#pragma unroll 1
  for (int tile = lane_of_thread(); tile < tiles; tile += kWarpSize) computed_blocks += cost_of_key(s_keys[tile]);
  computed_blocks = __reduce_add_sync(kAllLanes, computed_blocks);
  if (lane_of_thread() == 0) *g_computed_blocks = computed_blocks;
}

// Every tile's place among all tiles by falling cost is the number of tiles with a higher key; one warp a tile.
__device__ void write_order(const Share& share, int tiles, const int* s_keys, int* g_order) {
#pragma unroll 1
  for (int tile = share.warp(); tile < tiles; tile += share.warps()) {
    const int key = s_keys[tile];
    int place = 0;
#pragma unroll 1
    for (int other = kKeysPerLane * lane_of_thread(); other < tiles; other += kKeysPerLane * kWarpSize) {
      const int4 keys = *reinterpret_cast<const int4*>(s_keys + other);
      place += (keys.x > key) + (keys.y > key) + (keys.z > key) + (keys.w > key);
    }
    place = __reduce_add_sync(kAllLanes, place);
    if (lane_of_thread() == 0) g_order[place] = tile;
  }
}

// Where things lie in dynamic shared memory, in words. Behind the runs of each side comes the table of runs. The keys
// by which tiles are sorted take its place, unless the intervals of two sides still want it.
struct SharedMemory {
  int table = 0, sorting_keys = 0;

  __host__ __device__ SharedMemory(const SegmentProblem& p, int sides, int slots) {
    if (!slots) return;
    table = SegmentRuns::storage_words(p.query_length) + (sides == 2 ? SegmentRuns::storage_words(p.key_length) : 0);
    sorting_keys = table + (sides == 2 ? RunTable::storage_words(slots, sides) : 0);
  }
};

// The code runs once, from cold memory: loops are not unrolled because fetching instructions is what takes the time.
// `slots`: of the table of runs; 0: runs are not looked for, and a row that may be general is.
template <class Row>
__global__ void __launch_bounds__(kThreads)
    prepare_segments_kernel(const __grid_constant__ SegmentProblem p, const __grid_constant__ SegmentTables t,
                            int slots) {
  extern __shared__ __align__(16) unsigned s_storage[];
  ptx::launch_dependents();
  const int64_t b = blockIdx.x;
  // Of several thread blocks the first half writes what is told of tokens, and the others rank the tiles.
  const int blocks = static_cast<int>(gridDim.y), block = static_cast<int>(blockIdx.y), writers = (blocks + 1) / 2;
  const bool writes = block < writers, ranks = blocks == 1 || !writes;
  const Share share{block, writers};
  const Share of_orders{blocks == 1 ? 0 : block - writers, max(blocks - writers, 1)};
  const SharedMemory memory(p, Row::kSides, slots);
  const Row row(p, b, s_storage, memory.table, slots);
  int* s_keys = reinterpret_cast<int*>(s_storage) + memory.sorting_keys;
  const bool is_contiguous = (slots || !Row::kMayBeGeneral) && row.find_intervals();
  if (writes) {
    if (b == 0 && share.thread() < kTileCounters) t.counters[threadIdx.x] = 0;
    if (share.thread() == 0) t.mode[b] = is_contiguous ? kContiguous : kGeneral;
    if (is_contiguous) {
#pragma unroll 1
      for (int side = 0; side < Row::kSides; side++) {
        const bool are_keys = side == kKeySide;
        const int pitch = are_keys ? t.pitch_key : t.pitch_query;
        write_intervals(share, row, side, pitch, (are_keys ? t.query_begin : t.key_begin) + b * pitch,
                        (are_keys ? t.query_end : t.key_end) + b * pitch);
      }
    } else if constexpr (Row::kMayBeGeneral) {
      const auto queries = row.ids(kQuerySide), keys = row.ids(kKeySide);
      write_ids(share, queries, kQueryPadding, t.pitch_query, t.query_ids + b * t.pitch_query);
      write_ids(share, keys, kKeyPadding, t.pitch_key, t.key_ids + b * t.pitch_key);
#pragma unroll 1
      for (int tile = share.warp(); tile < t.query_tiles + t.key_tiles; tile += share.warps()) {
        if (tile < t.query_tiles) {
          write_block(queries, p.query_tile, tile, t.query_blocks + b * t.query_tiles);
        } else {
          write_block(keys, p.key_tile, tile - t.query_tiles, t.key_blocks + b * t.key_tiles);
        }
      }
    }
  }
  if (!ranks) return;

  // Two orders are made side by side by the even and the odd ones of these thread blocks, where there are two.
  const int orders = p.ordered_queries ? 2 : 1, is_split = orders == 2 && of_orders.blocks > 1;
#pragma unroll 1
  for (int which = of_orders.block & is_split; which < orders; which += 1 + is_split) {
    const bool of_queries = which == 1 || p.order_of == SegmentSide::kQueries;
    const int size = which == 1 ? p.ordered_queries : of_queries ? p.query_tile : p.key_tile;
    const int tiles = which == 1 ? count_tiles(p.query_length, size) : of_queries ? t.query_tiles : t.key_tiles;
#pragma unroll 1
    for (int tile = threadIdx.x; tile < round_up(tiles, kKeysPerLane); tile += kThreads) {
      const bool exists = tile < tiles;
      s_keys[tile] = exists ? sorting_key(tile_cost(p, of_queries, size, tile, is_contiguous, row), tile) : kNoKey;
    }
    __syncthreads();
    if (which == 0 && of_orders.warp() == kWarps - 1) write_computed_blocks(tiles, s_keys, t.computed_blocks + b);
    const Share of_order{of_orders.block >> is_split, (of_orders.blocks + (is_split & ~which)) >> is_split};
    write_order(of_order, tiles, s_keys, (which == 1 ? t.query_order : t.order) + b * tiles);
    if (which + 1 < orders) __syncthreads();  // the next order's keys take the place of these
  }
}

// Key ids that are the query ids under another name ask for nothing of their own, unless positions tell the sides
// apart.
SegmentProblem without_repeated_ids(SegmentProblem p) {
  if (!p.positions.of_queries && p.key_ids == p.query_ids && p.key_length == p.query_length &&
      p.key_stride_batch == p.query_stride_batch && p.key_stride_token == p.query_stride_token) {
    p.key_ids = nullptr;
  }
  return p;
}

template <class Id>
auto find_kernel(const SegmentProblem& p) {
  if (p.cache.lengths) return prepare_segments_kernel<CacheRow>;
  if (p.positions.of_queries) return prepare_segments_kernel<OrderedRow<Id>>;
  return p.key_ids ? prepare_segments_kernel<Row<Id, 2>> : prepare_segments_kernel<Row<Id, 1>>;
}

constexpr int kDefaultSharedMemory = 48 * 1024, kOwnSharedMemory = 2 * 1024;  // of which so much is the kernel's own

// Bytes of dynamic shared memory. `tiles`: of the longer order.
int shared_memory(const SegmentProblem& p, int sides, int slots, int tiles) {
  const SharedMemory memory(p, sides, slots);
  const int table_end = memory.table + RunTable::storage_words(slots, sides);
  return 4 * std::max(table_end, memory.sorting_keys + round_up(tiles, kKeysPerLane));
}

// The most that a row takes whose keys have no ids of their own, and one whose runs are not looked for.
constexpr int kMaxSharedMemory =
    4 * (SegmentRuns::storage_words(kMaxSegmentLength) + std::max(kMaxTiles, RunTable::slots_for(kMaxSegmentLength)));
static_assert(kMaxSharedMemory + kOwnSharedMemory <= 227 * 1024, "what Hopper has");
static_assert(4 * kMaxTiles + kOwnSharedMemory <= 99 * 1024, "what every card has, without runs");

SegmentTables carve_tables(const SegmentProblem& p, Carver& carver) {
  SegmentTables t{};
  const int64_t batch = p.batch;
  t.pitch_query = round_up(p.query_length, kSegmentPitch) + kSegmentPitch;
  t.pitch_key = round_up(p.key_length, kSegmentPitch) + kSegmentPitch;
  t.query_tiles = count_tiles(p.query_length, p.query_tile);
  t.key_tiles = count_tiles(p.key_length, p.key_tile);
  t.counters = carver.take<int>(kTileCounters);
  t.mode = carver.take<int>(batch);
  t.computed_blocks = carver.take<int>(batch);
  t.key_begin = t.query_begin = carver.take<int>(batch * t.pitch_query);
  t.key_end = t.query_end = carver.take<int>(batch * t.pitch_query);
  if (!p.cache.lengths) {
    t.query_ids = carver.take<int>(batch * t.pitch_query);
    t.key_ids = carver.take<int>(batch * t.pitch_key);
    t.query_blocks = carver.take<SegmentBlock>(batch * t.query_tiles);
    t.key_blocks = carver.take<SegmentBlock>(batch * t.key_tiles);
  }
  if (without_repeated_ids(p).key_ids) {
    t.query_begin = carver.take<int>(batch * t.pitch_key);
    t.query_end = carver.take<int>(batch * t.pitch_key);
  }
  t.order = carver.take<int>(batch * (p.order_of == SegmentSide::kQueries ? t.query_tiles : t.key_tiles));
  t.query_order =
      p.ordered_queries ? carver.take<int>(batch * count_tiles(p.query_length, p.ordered_queries)) : nullptr;
  return t;
}

}  // namespace

int64_t segment_tables_bytes(const SegmentProblem& problem) {
  Carver carver{nullptr};
  carve_tables(problem, carver);
  return carver.used;
}

SegmentTables make_segment_tables(const SegmentProblem& problem, void* storage) {
  Carver carver{static_cast<char*>(storage)};
  return carve_tables(problem, carver);
}

bool segments_are_built_for(int device) { return is_built_for<prepare_segments_kernel<Row<int, 1>>>(device); }

cudaError_t launch_prepare_segments(const SegmentProblem& asked, const SegmentTables& tables, cudaStream_t stream) {
  const SegmentProblem problem = without_repeated_ids(asked);
  const int ordered = problem.order_of == SegmentSide::kQueries ? tables.query_tiles : tables.key_tiles;
  const int ordered_queries = problem.ordered_queries ? count_tiles(problem.query_length, problem.ordered_queries) : 0;
  const int tiles = std::max(ordered, ordered_queries);
  const int most_keys = problem.cache.lengths ? kMaxCacheCapacity : kMaxSegmentLength;
  if (problem.query_length > kMaxSegmentLength || problem.key_length > most_keys || tiles > kMaxTiles) {
    return cudaErrorInvalidValue;
  }
  int device = 0, available = 0;
  if (const cudaError_t status = cudaGetDevice(&device)) return status;
  if (const cudaError_t status = find_shared_memory(device, available)) return status;
  available -= kOwnSharedMemory;
  const int sides = problem.key_ids ? 2 : 1;
  int slots = problem.may_be_general() ? RunTable::slots_for(problem.query_length) : 0;
  // Two sides take much: then rather a table for fewer runs than none.
  while (sides == 2 && slots > kWarpSize && shared_memory(problem, sides, slots, tiles) > available) slots /= 2;
  if (shared_memory(problem, sides, slots, tiles) > available) slots = 0;
  const int bytes = shared_memory(problem, sides, slots, tiles);
  const auto kernel = problem.ids_are_int64 ? find_kernel<int64_t>(problem) : find_kernel<int>(problem);
  if (bytes > kDefaultSharedMemory - kOwnSharedMemory) {
    // As much as any row takes on this card: what another thread sets at the same time must not be less than this call
    // needs.
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, available);
    if (status != cudaSuccess) return status;
  }
  const int pitch = std::max(tables.pitch_query, tables.pitch_key);
  const int most = std::clamp(kMaxGrid / problem.batch, 1, kMaxBlocks);
  const int blocks_per_row = std::min(count_tiles(pitch, kThreads), most);
  kernel<<<dim3(problem.batch, blocks_per_row), kThreads, bytes, stream>>>(problem, tables, slots);
  return cudaGetLastError();
}

}  // namespace selfattn::cuda
