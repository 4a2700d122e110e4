#include "segments.h"

// The range check of int64 ids is part of the operator, not a debugging aid.
#undef NDEBUG
#include <cuda_runtime.h>

#include <cassert>
#include <climits>

#include "../ptx/cluster.cuh"
#include "../ptx/launch.cuh"
#include "../ptx/mbarrier.cuh"
#include "params.h"

namespace selfattn::cuda {
namespace {

// A cluster of thread blocks shares a batch row; its warps take the row's words of 32 tokens in stretches.
constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kBlocks = 8, kClusterThreads = kBlocks * kThreads, kClusterWarps = kBlocks * kWarps;
constexpr unsigned kAllLanes = ~0u;
constexpr int kMaxTiles = 1 << 14;  // a row; a tile's cost and its number share the 32 bits of a sorting key

__host__ __device__ int count_tiles(int length, int tile) { return (length + tile - 1) / tile; }

__device__ int64_t batch_row() { return blockIdx.x / kBlocks; }
__device__ int block_in_row() { return blockIdx.x % kBlocks; }
__device__ int cluster_thread() { return block_in_row() * kThreads + threadIdx.x; }
__device__ int cluster_warp() { return cluster_thread() / 32; }

// Ids of one side of one batch row, Id being int or int64_t.
template <class Id>
struct IdRow {
  const Id* data;
  int64_t stride;
  int length;

  __device__ int operator[](int token) const {
    const Id id = data[token * stride];
    if constexpr (sizeof(Id) > sizeof(int)) assert(id >= INT_MIN && id <= INT_MAX && "segment ids must fit in int32");
    return static_cast<int>(id);
  }
};

template <class Id>
__device__ IdRow<Id> id_row(const void* ids, int64_t stride_batch, int64_t stride_token, int length) {
  return {static_cast<const Id*>(ids) + batch_row() * stride_batch, stride_token, length};
}

// Two bits a token, 32 tokens a word, in the shared memory of the thread block that looks after them.
struct RunBits {
  unsigned* starts;           // a run of equal ids starts here
  unsigned* real;             // not padding
  int first_word, last_word;  // of this warp
  int block_word;             // of this thread block, the first

  __device__ RunBits(unsigned* storage, int length) : starts(storage) {
    const int words = (length + 31) / 32, words_a_warp = (words + kClusterWarps - 1) / kClusterWarps;
    real = storage + words_a_warp * kWarps;
    block_word = block_in_row() * kWarps * words_a_warp;
    first_word = min(cluster_warp() * words_a_warp, words);
    last_word = min(first_word + words_a_warp, words);
  }
};

// What was seen of a stretch of the row. Eight words, so that it travels between thread blocks.
struct Stretch {
  int first_start, last_start;      // tokens, or INT_MAX / -1
  int first_real_id, last_real_id;  // ids >= 0, or -1 if there is none
  int first_real_is_start, increases;
};
constexpr int kStretchWords = sizeof(Stretch) / 4;

__device__ int highest_bit(unsigned bits) { return 31 - __clz(bits); }
__device__ int lowest_bit(unsigned bits) { return __ffs(bits) - 1; }

// Marks run starts and padding. A row is contiguous iff the ids at the starts of its real runs strictly increase.
template <class Id>
__device__ Stretch mark_runs(const IdRow<Id>& ids, const RunBits& bits) {
  const int lane = threadIdx.x % 32;
  Stretch seen{INT_MAX, -1, -1, -1, 0, 1};
#pragma unroll 1
  for (int word = bits.first_word; word < bits.last_word; word++) {
    const int token = word * 32 + lane;
    const bool exists = token < ids.length;
    const int id = exists ? max(ids[token], -1) : -1;
    const int before = exists && token > 0 ? max(ids[token - 1], -1) : INT_MIN;
    const bool is_start = exists && id != before, is_real = id >= 0;
    const unsigned starts = __ballot_sync(kAllLanes, is_start), real = __ballot_sync(kAllLanes, is_real);
    const unsigned real_before = real & ((1u << lane) - 1);
    const int neighbour = __shfl_sync(kAllLanes, id, real_before ? highest_bit(real_before) : 0);
    const int previous_id = real_before ? neighbour : seen.last_real_id;
    if (is_real && is_start && id <= previous_id) seen.increases = 0;
    if (lane == 0) bits.starts[word - bits.block_word] = starts, bits.real[word - bits.block_word] = real;
    if (starts) {
      if (seen.first_start == INT_MAX) seen.first_start = word * 32 + lowest_bit(starts);
      seen.last_start = word * 32 + highest_bit(starts);
    }
    if (real) {
      if (seen.last_real_id < 0) {
        seen.first_real_id = __shfl_sync(kAllLanes, id, lowest_bit(real));
        seen.first_real_is_start = starts >> lowest_bit(real) & 1;
      }
      seen.last_real_id = __shfl_sync(kAllLanes, id, highest_bit(real));
    }
  }
  seen.increases = __all_sync(kAllLanes, seen.increases);
  return seen;
}

// The stretches of 32 lanes, in order, as one.
__device__ Stretch join(const Stretch& mine) {
  const int lane = threadIdx.x % 32;
  const unsigned real = __ballot_sync(kAllLanes, mine.first_real_id >= 0), real_before = real & ((1u << lane) - 1);
  const int neighbour = __shfl_sync(kAllLanes, mine.last_real_id, real_before ? highest_bit(real_before) : 0);
  const bool joins =
      mine.first_real_id < 0 || !mine.first_real_is_start || !real_before || mine.first_real_id > neighbour;
  const int first = real ? lowest_bit(real) : 0, last = real ? highest_bit(real) : 0;
  Stretch all;
  all.first_start = __reduce_min_sync(kAllLanes, mine.first_start);
  all.last_start = __reduce_max_sync(kAllLanes, mine.last_start);
  all.first_real_id = __shfl_sync(kAllLanes, mine.first_real_id, first);
  all.last_real_id = __shfl_sync(kAllLanes, mine.last_real_id, last);
  all.first_real_is_start = __shfl_sync(kAllLanes, mine.first_real_is_start, first);
  all.increases = __all_sync(kAllLanes, mine.increases && joins);
  return all;
}

// What the whole row says to each warp: is it contiguous, and which starts lie nearest outside the warp's stretch.
struct RowView {
  bool is_contiguous;
  int start_before, start_after;
};

__device__ RowView share_stretches(const Stretch& mine, int length) {
  __shared__ Stretch s_warps[kWarps], s_block;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = block_in_row();
  if (lane == 0) s_warps[warp] = mine;
  __syncthreads();
  const Stretch neighbours = s_warps[lane];  // kWarps == 32
  const Stretch joined = join(neighbours);
  if (threadIdx.x == 0) s_block = joined;
  ptx::cluster_sync();
  Stretch blocks{INT_MAX, -1, -1, -1, 0, 1};
  if (lane < kBlocks) {
    int words[kStretchWords];
    for (int i = 0; i < kStretchWords; i++)
      words[i] = ptx::load_from_block(ptx::shared_address(&s_block) + 4 * i, lane);
    blocks = {words[0], words[1], words[2], words[3], words[4], words[5]};
  }
  const int before = max(lane < warp ? neighbours.last_start : -1, lane < block ? blocks.last_start : -1);
  const int after = min(lane > warp ? neighbours.first_start : INT_MAX, lane > block ? blocks.first_start : INT_MAX);
  return {join(blocks).increases != 0, __reduce_max_sync(kAllLanes, before),
          min(__reduce_min_sync(kAllLanes, after), length)};
}

// run_begin and run_end of a contiguous row. Padding gets the empty run [i, i), what lies past the end [length,
// length).
__device__ void write_runs(const RunBits& bits, const RowView& row, int length, int pitch, int* g_begin, int* g_end) {
  const int lane = threadIdx.x % 32;
  int start = row.start_before;
#pragma unroll 1
  for (int word = bits.first_word; word < bits.last_word; word++) {
    const unsigned starts = bits.starts[word - bits.block_word], up_to_lane = starts & (kAllLanes >> (31 - lane));
    const int token = word * 32 + lane, begin = up_to_lane ? word * 32 + highest_bit(up_to_lane) : start;
    if (token < length) g_begin[token] = bits.real[word - bits.block_word] >> lane & 1 ? begin : token;
    if (starts) start = word * 32 + highest_bit(starts);
  }
  int next = row.start_after;
#pragma unroll 1
  for (int word = bits.last_word - 1; word >= bits.first_word; word--) {
    const unsigned starts = bits.starts[word - bits.block_word], past_lane = starts & ~(kAllLanes >> (31 - lane));
    const int token = word * 32 + lane, end = past_lane ? word * 32 + lowest_bit(past_lane) : next;
    if (token < length) g_end[token] = bits.real[word - bits.block_word] >> lane & 1 ? end : token;
    if (starts) next = word * 32 + lowest_bit(starts);
  }
#pragma unroll 1
  for (int token = length + cluster_thread(); token < pitch; token += kClusterThreads)
    g_begin[token] = g_end[token] = length;
}

template <class Id>
__device__ void write_ids(const IdRow<Id>& ids, int padding, int pitch, int* g_ids) {
#pragma unroll 1
  for (int token = cluster_thread(); token < pitch; token += kClusterThreads) {
    const int id = token < ids.length ? ids[token] : -1;
    g_ids[token] = id < 0 ? padding : id;
  }
}

__device__ uint64_t signature_bit(int id) { return uint64_t(1) << (static_cast<unsigned>(id) * 0x9E3779B1u >> 26); }

// One warp a block. A block that holds one id and padding is made to look like two ids: uniform means unmasked.
template <class Id>
__device__ void write_blocks(const IdRow<Id>& ids, int tile, int tiles, SegmentBlock* g_blocks) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int block = cluster_warp(); block < tiles; block += kClusterWarps) {
    int min_id = INT_MAX, max_id = INT_MIN;
    unsigned low = 0, high = 0;
    bool has_padding = false;
#pragma unroll 1
    for (int token = block * tile + lane; token < min((block + 1) * tile, ids.length); token += 32) {
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
}

// How many tiles of the other side tile `tile` has to visit, by its runs (null: any) and the window.
__device__ int tile_cost(const SegmentProblem& p, bool of_queries, int size, int tile, const int* g_begin,
                         const int* g_end) {
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
  if (g_begin) begin = max(begin, g_begin[first]), end = min(end, g_end[last]);
  return end > begin ? (end - 1) / other_size - begin / other_size + 1 : 0;
}

// Every tile's place among all tiles by falling cost is the number of tiles with a higher key; one warp a tile.
__device__ void write_order(int tiles, const int* s_keys, int* g_order) {
#pragma unroll 1
  for (int tile = cluster_warp(); tile < tiles; tile += kClusterWarps) {
    int place = 0;
#pragma unroll 1
    for (int other = threadIdx.x % 32; other < tiles; other += 32) place += s_keys[other] > s_keys[tile];
    place = __reduce_add_sync(kAllLanes, place);
    if (threadIdx.x % 32 == 0) g_order[place] = tile;
  }
}

// The code runs once, from cold memory: loops are not unrolled because fetching instructions is what takes the time.
template <class Id>
__global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kThreads)
    prepare_segments_kernel(const __grid_constant__ SegmentProblem p, const __grid_constant__ SegmentTables t) {
  extern __shared__ unsigned s_storage[];
  ptx::launch_dependents();
  const int64_t b = batch_row();
  if (b == 0 && cluster_thread() < kTileCounters) t.counters[threadIdx.x] = 0;
  const auto queries = id_row<Id>(p.query_ids, p.query_stride_batch, p.query_stride_token, p.query_length);
  int *g_begin = t.run_begin + b * t.pitch_query, *g_end = t.run_end + b * t.pitch_query;
  bool is_contiguous = false;
  if (!p.key_ids) {
    const RunBits bits(s_storage, p.query_length);
    const RowView row = share_stretches(mark_runs(queries, bits), p.query_length);
    is_contiguous = row.is_contiguous;
    if (is_contiguous) write_runs(bits, row, p.query_length, t.pitch_query, g_begin, g_end);
  }
  if (!is_contiguous) {
    const auto keys = p.key_ids ? id_row<Id>(p.key_ids, p.key_stride_batch, p.key_stride_token, p.key_length) : queries;
    write_ids(queries, kQueryPadding, t.pitch_query, t.query_ids + b * t.pitch_query);
    write_ids(keys, kKeyPadding, t.pitch_key, t.key_ids + b * t.pitch_key);
    write_blocks(queries, p.query_tile, t.query_tiles, t.query_blocks + b * t.query_tiles);
    write_blocks(keys, p.key_tile, t.key_tiles, t.key_blocks + b * t.key_tiles);
  }
  if (cluster_thread() == 0) t.mode[b] = is_contiguous ? kContiguous : kGeneral;
  ptx::cluster_sync();  // the runs are written, and the bits in shared memory are done with

  int* s_keys = reinterpret_cast<int*>(s_storage);
  __shared__ int s_visits;
  if (threadIdx.x == 0) s_visits = 0;
#pragma unroll 1
  for (int which = 0; which < (p.ordered_queries ? 2 : 1); which++) {
    const bool of_queries = which == 1 || p.order_of == SegmentSide::kQueries;
    const int size = which == 1 ? p.ordered_queries : of_queries ? p.query_tile : p.key_tile;
    const int tiles = count_tiles(of_queries ? p.query_length : p.key_length, size);
    __syncthreads();
    int visits = 0;
#pragma unroll 1
    for (int tile = threadIdx.x; tile < tiles; tile += kThreads) {
      const int cost = tile_cost(p, of_queries, size, tile, is_contiguous ? g_begin : nullptr, g_end);
      s_keys[tile] = cost * kMaxTiles + kMaxTiles - 1 - tile;
      visits += cost;
    }
    if (which == 0 && cluster_thread() < kThreads) {
      visits = __reduce_add_sync(kAllLanes, visits);
      if (threadIdx.x % 32 == 0 && visits) atomicAdd(&s_visits, visits);
    }
    __syncthreads();
    if (which == 0 && cluster_thread() == 0) t.visits[b] = s_visits;
    write_order(tiles, s_keys, (which == 1 ? t.query_order : t.order) + b * tiles);
  }
}

// Key ids that are the query ids under another name ask for nothing of their own.
SegmentProblem without_repeated_ids(SegmentProblem p) {
  if (p.key_ids == p.query_ids && p.key_length == p.query_length && p.key_stride_batch == p.query_stride_batch &&
      p.key_stride_token == p.query_stride_token) {
    p.key_ids = nullptr;
  }
  return p;
}

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// Hands out 256-byte-aligned arrays one after the other.
struct Carver {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(base + used);
    used += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
    return array;
  }
};

SegmentTables carve_tables(const SegmentProblem& p, Carver& carver) {
  SegmentTables t;
  const int64_t batch = p.batch;
  t.pitch_query = round_up(p.query_length, kSegmentPitch) + kSegmentPitch;
  t.pitch_key = round_up(p.key_length, kSegmentPitch) + kSegmentPitch;
  t.query_tiles = count_tiles(p.query_length, p.query_tile);
  t.key_tiles = count_tiles(p.key_length, p.key_tile);
  t.counters = carver.take<int>(kTileCounters);
  t.mode = carver.take<int>(batch);
  t.visits = carver.take<int>(batch);
  t.query_ids = carver.take<int>(batch * t.pitch_query);
  t.key_ids = carver.take<int>(batch * t.pitch_key);
  t.run_begin = carver.take<int>(batch * t.pitch_query);
  t.run_end = carver.take<int>(batch * t.pitch_query);
  t.query_blocks = carver.take<SegmentBlock>(batch * t.query_tiles);
  t.key_blocks = carver.take<SegmentBlock>(batch * t.key_tiles);
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

cudaError_t launch_prepare_segments(const SegmentProblem& asked, const SegmentTables& tables, cudaStream_t stream) {
  const SegmentProblem problem = without_repeated_ids(asked);
  const int ordered = problem.order_of == SegmentSide::kQueries ? tables.query_tiles : tables.key_tiles;
  const int ordered_queries = problem.ordered_queries ? count_tiles(problem.query_length, problem.ordered_queries) : 0;
  const int tiles = ordered > ordered_queries ? ordered : ordered_queries;
  if (problem.query_length > kMaxSegmentLength || problem.key_length > kMaxSegmentLength || tiles > kMaxTiles) {
    return cudaErrorInvalidValue;
  }
  const int bit_bytes = problem.key_ids ? 0 : 2 * 4 * kWarps * count_tiles(problem.query_length, 32 * kClusterWarps);
  const int key_bytes = 4 * tiles, bytes = bit_bytes > key_bytes ? bit_bytes : key_bytes;
  const auto kernel = problem.ids_are_int64 ? prepare_segments_kernel<int64_t> : prepare_segments_kernel<int>;
  constexpr int kDefaultSharedMemory = 46 * 1024;  // of 48 KB; the rest is the kernel's own
  if (bytes > kDefaultSharedMemory) {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) return status;
  }
  kernel<<<kBlocks * problem.batch, kThreads, bytes, stream>>>(problem, tables);
  return cudaGetLastError();
}

}  // namespace selfattn::cuda
