// Chunks of queries in a call with ids, for the forward kernels: the rows of the cache that have many queries are cut
// into tiles, and each tile is a batch row of a call without ids. What few queries a row has is left to the kernel for
// those.
//
//   plan      ids, lengths -> tiles, and the ids of the rest
//   gather    queries, page table -> those of the tiles
//   (the forward kernel over the tiles, the kernel for few queries over the rest)
//   scatter   results of the tiles -> the call's
//
// How many tiles there are is known on the device alone; most_chunk_tiles of them are computed, and those that are not
// there have no queries.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "flash/params.h"

namespace selfattn::cuda {

constexpr int kLeastQueriesOfChunk = 64;  // of a row that is cut into tiles

struct ChunkTiles {
  // Of the call.
  int batch, queries;   // tokens: batch * queries, fewer than 2^31
  int rows;             // of the cache
  IntegerView ids;      // (batch, queries) the row of a token, negative: none; one of `rows` or more stops the device
  IntegerView lengths;  // (rows, 1)
  IntegerView page_table;  // (rows, pages_per_row), or null: row r has page r alone
  int pages_per_row;
  int num_heads, dim_qk, dim_v;  // dims multiples of 8
  TensorView q;                  // (batch, queries, num_heads, dim_qk), 2 bytes an element, kAligned
  int tile;                      // queries of a tile

  // Of the tiles, each written as a whole. The memory's former contents do not matter.
  int count;            // most_chunk_tiles
  CacheTile* tiles;     // (count)
  int* tile_starts;     // (count) the tile's first token in token_order
  int* token_order;     // (batch * queries) tokens by row, those of a row in the call's order
  int* token_counts;    // (rows + 1), of a row
  int* token_starts;    // (rows + 1), for the plan alone
  int* rest_ids;        // (batch, queries) the ids, but negative where a tile has the token
  void* queries_tiled;  // (count, tile, num_heads, dim_qk), zeros where a tile has no query
  int* pages_tiled;     // (count, pages_per_row) of the tile's row; an entry outside int32 becomes -1
};

// The count that holds the tiles of any ids.
int64_t most_chunk_tiles(int64_t tokens, int64_t rows, int tile);

// Sets the arrays but queries_tiled, 256-byte aligned in `memory` of as many bytes as this returns; null: asks how
// many.
int64_t place_chunk_tiles(ChunkTiles& chunks, void* memory);

cudaError_t launch_plan_chunk_tiles(const ChunkTiles& chunks, cudaStream_t stream);
cudaError_t launch_gather_chunk_tiles(const ChunkTiles& chunks, cudaStream_t stream);
// out_tiled (count, tile, num_heads, dim_v) and lse_tiled (count, num_heads, tile), into out (batch, queries,
// num_heads, dim_v) and lse (batch, num_heads, queries), all contiguous and aligned to 16 bytes: of tokens that a tile
// has, and no others.
cudaError_t launch_scatter_chunk_tiles(const ChunkTiles& chunks, const void* out_tiled, const float* lse_tiled,
                                       void* out, float* lse, cudaStream_t stream);

}  // namespace selfattn::cuda
