#include "chunk_tiles.h"

#include <algorithm>

#include "host/carver.h"
#include "row_tokens.cuh"

namespace selfattn::cuda {
namespace {

using kv_cache::kPrepareThreads;
using kv_cache::kPrepareWarps;
using kv_cache::RowTokens;

constexpr int kCopyThreads = 256, kCopyWarps = kCopyThreads / kWarpSize;
constexpr int kElementsOfChunk = 8;  // of 2 bytes, in the 16 that a thread moves at a time

struct PlanParams {
  ChunkTiles chunks;
  Divisor queries, tile;
};

__global__ void __launch_bounds__(kPrepareThreads) plan_chunk_tiles_kernel(const __grid_constant__ PlanParams p) {
  __shared__ int s_sums[kPrepareWarps];
  const ChunkTiles& chunks = p.chunks;
  const int tokens = chunks.batch * chunks.queries;
  const RowTokens row_tokens{chunks.ids,          p.queries,          tokens, chunks.rows, chunks.token_order,
                             chunks.token_counts, chunks.token_starts};
  const auto has_tiles = [&](int row, int count) { return row < chunks.rows && count >= kLeastQueriesOfChunk; };
  int tiles = 0;
  row_tokens.sort(s_sums, [&](int row, int start, int count) {
    const int row_tiles = has_tiles(row, count) ? (count + chunks.tile - 1) / p.tile : 0;
    const int first_tile = kv_cache::sum_before(row_tiles, tiles, s_sums);
    if (row_tiles == 0) return;
    // What reads the tables stops the device at a length that does not fit the cache.
    const int first_position = static_cast<int>(chunks.lengths.at(row, 0)) - count;
    for (int i = 0; i < row_tiles; i++) {
      const int index = first_tile + row_tiles - 1 - i;  // the longest intervals of keys first
      const int before = i * chunks.tile;
      chunks.tiles[index] = {row, first_position + before, ::min(chunks.tile, count - before)};
      chunks.tile_starts[index] = start + before;
    }
  });
  for (int index = tiles + static_cast<int>(threadIdx.x); index < chunks.count; index += kPrepareThreads)
    chunks.tiles[index] = {0, 0, 0}, chunks.tile_starts[index] = 0;
  for (int token = static_cast<int>(threadIdx.x); token < tokens; token += kPrepareThreads) {
    const int row = row_tokens.row_of(token);
    chunks.rest_ids[token] = row == chunks.rows || has_tiles(row, chunks.token_counts[row]) ? -1 : row;
  }
}

struct CopyParams {
  ChunkTiles chunks;
  Divisor queries;
  int head_chunks;  // of 16 bytes, of a head of what is copied: a query, or an output
};

// One thread block a (tile, share of its queries), one warp a query.
__global__ void __launch_bounds__(kCopyThreads) gather_chunk_tiles_kernel(const __grid_constant__ CopyParams p) {
  const ChunkTiles& chunks = p.chunks;
  const int index = static_cast<int>(blockIdx.x), lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const CacheTile tile = chunks.tiles[index];
  const int row_chunks = chunks.num_heads * p.head_chunks;
  auto* out = static_cast<uint4*>(chunks.queries_tiled) + int64_t(index) * chunks.tile * row_chunks;
  const int first = static_cast<int>(blockIdx.y) * kCopyWarps + static_cast<int>(threadIdx.x) / kWarpSize;
  for (int query = first; query < chunks.tile; query += static_cast<int>(gridDim.y) * kCopyWarps) {
    const bool exists = query < tile.count;
    const int token = exists ? chunks.token_order[chunks.tile_starts[index] + query] : 0;
    const int batch = token / p.queries, column = token - batch * p.queries.value;
    const auto* q =
        static_cast<const uint16_t*>(chunks.q.data) + batch * chunks.q.stride_batch + column * chunks.q.stride_token;
    for (int i = lane; i < row_chunks; i += kWarpSize) {
      const int head = i / p.head_chunks, chunk = i - head * p.head_chunks;
      const auto* source = q + head * chunks.q.stride_head + chunk * kElementsOfChunk;
      out[int64_t(query) * row_chunks + i] = exists ? *reinterpret_cast<const uint4*>(source) : uint4{};
    }
  }
  const int step = static_cast<int>(gridDim.y) * kCopyThreads;
  for (int page = static_cast<int>(blockIdx.y * kCopyThreads + threadIdx.x); page < chunks.pages_per_row;
       page += step) {
    const int64_t entry = chunks.page_table ? chunks.page_table.at(tile.row, page) : tile.row;
    chunks.pages_tiled[int64_t(index) * chunks.pages_per_row + page] =
        entry == static_cast<int>(entry) ? static_cast<int>(entry) : -1;
  }
}

struct Results {
  const uint4* out_tiled;
  const float* lse_tiled;
  uint4* out;
  float* lse;
};

__global__ void __launch_bounds__(kCopyThreads)
    scatter_chunk_tiles_kernel(const __grid_constant__ CopyParams p, const __grid_constant__ Results results) {
  const ChunkTiles& chunks = p.chunks;
  const int index = static_cast<int>(blockIdx.x), lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int count = chunks.tiles[index].count, start = chunks.tile_starts[index];
  const int row_chunks = chunks.num_heads * p.head_chunks;
  const int first = static_cast<int>(blockIdx.y) * kCopyWarps + static_cast<int>(threadIdx.x) / kWarpSize;
  for (int query = first; query < count; query += static_cast<int>(gridDim.y) * kCopyWarps) {
    const int token = chunks.token_order[start + query];
    const uint4* from = results.out_tiled + (int64_t(index) * chunks.tile + query) * row_chunks;
    uint4* to = results.out + int64_t(token) * row_chunks;
    for (int i = lane; i < row_chunks; i += kWarpSize) to[i] = from[i];
    const int batch = token / p.queries, column = token - batch * p.queries.value;
    for (int head = lane; head < chunks.num_heads; head += kWarpSize)
      results.lse[(int64_t(batch) * chunks.num_heads + head) * chunks.queries + column] =
          results.lse_tiled[(int64_t(index) * chunks.num_heads + head) * chunks.tile + query];
  }
}

CopyParams copy_params(const ChunkTiles& chunks, int dim) {
  return {chunks, Divisor::of(chunks.queries), dim / kElementsOfChunk};
}

// Few tiles share the device's threads by their queries.
dim3 copy_grid(const ChunkTiles& chunks) { return dim3(chunks.count, (chunks.tile + kCopyWarps - 1) / kCopyWarps); }

}  // namespace

int64_t most_chunk_tiles(int64_t tokens, int64_t rows, int tile) {
  return tokens / tile + std::min(rows, tokens / kLeastQueriesOfChunk);
}

int64_t place_chunk_tiles(ChunkTiles& chunks, void* memory) {
  Carver carver{static_cast<char*>(memory)};
  const int64_t tokens = int64_t(chunks.batch) * chunks.queries;
  chunks.tiles = carver.take<CacheTile>(chunks.count);
  chunks.tile_starts = carver.take<int>(chunks.count);
  chunks.token_order = carver.take<int>(tokens);
  chunks.token_counts = carver.take<int>(chunks.rows + 1);
  chunks.token_starts = carver.take<int>(chunks.rows + 1);
  chunks.rest_ids = carver.take<int>(tokens);
  chunks.pages_tiled = carver.take<int>(int64_t(chunks.count) * chunks.pages_per_row);
  return carver.used;
}

cudaError_t launch_plan_chunk_tiles(const ChunkTiles& chunks, cudaStream_t stream) {
  const PlanParams p{chunks, Divisor::of(chunks.queries), Divisor::of(chunks.tile)};
  plan_chunk_tiles_kernel<<<1, kPrepareThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t launch_gather_chunk_tiles(const ChunkTiles& chunks, cudaStream_t stream) {
  gather_chunk_tiles_kernel<<<copy_grid(chunks), kCopyThreads, 0, stream>>>(copy_params(chunks, chunks.dim_qk));
  return cudaGetLastError();
}

cudaError_t launch_scatter_chunk_tiles(const ChunkTiles& chunks, const void* out_tiled, const float* lse_tiled,
                                       void* out, float* lse, cudaStream_t stream) {
  scatter_chunk_tiles_kernel<<<copy_grid(chunks), kCopyThreads, 0, stream>>>(
      copy_params(chunks, chunks.dim_v),
      Results{static_cast<const uint4*>(out_tiled), lse_tiled, static_cast<uint4*>(out), lse});
  return cudaGetLastError();
}

}  // namespace selfattn::cuda
