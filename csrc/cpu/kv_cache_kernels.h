#pragma once

// What the CPU kernel of attention over a KV cache reads and writes, as plain values. It reads keys and values where
// they lie: each is used by few queries, so that packing would cost more than the products.
#include <algorithm>
#include <atomic>

#include "cpu/flash_kernels.h"

namespace selfattn::cpu {

/// A (P, page size, NKV, D) tensor whose last dimension is contiguous; strides in elements.
struct CacheView {
  const void* data = nullptr;
  int64_t page_stride = 0, token_stride = 0, head_stride = 0;
};

/// A query token: where its heads are, and the keys of its cache row that it may attend to.
struct CacheQuery {
  int32_t batch, token;                // of q and out
  int64_t first_key = 0, end_key = 0;  // empty where equal
  uint32_t draft_keys = 0;             // bit i: key first_draft_key + i of its tile, too
};

/// Query rows of one cache row that go through its keys together: row = query token * group + head in the group,
/// counted from the tile's first query.
struct CacheTile {
  int64_t cache_row;
  int64_t first_query;  // of KvCacheKernelProblem::queries
  int64_t first_row, rows;
  int64_t first_draft_key;
  int64_t first_key = 0, end_key = 0;                // the keys that some row may attend to lie in here
  int64_t common_first_key = 0, common_end_key = 0;  // every row may attend to these
  int64_t first_task = 0;                            // set by make_tiles
  int64_t first_chunk = 0, chunks = 1;               // likewise: pieces of keys, each a task of its own
};

constexpr int64_t kCacheSpan = 64;      // keys whose scores are held at once; chunks are multiples of it
constexpr int64_t kCacheTileRows = 64;  // at most

/// A task is a chunk of a tile's keys for `heads_per_task` key heads. Chunks begin at multiples of `chunk_keys`,
/// counted from key 0. Where a tile has several, each leaves its state, and the one that ends last merges them in
/// order: what is computed depends on chunk_keys alone.
struct KvCacheKernelProblem {
  int64_t query_heads, key_heads, head_dim, value_dim, page_size;
  double scale, softcap;
  TokenView query, out;
  float* lse = nullptr;  // (B, NH, Sq)
  int64_t query_length;
  CacheView key, value;
  const int64_t* page_table = nullptr;  // (cache rows, pages_per_row); null: page r is row r
  int64_t pages_per_row = 0;
  const float* sinks = nullptr;  // (NH,) or null
  const CacheQuery* queries;
  const CacheTile* tiles;
  int64_t tile_count;

  int64_t tile_rows;  // of the largest tile
  int64_t chunk_keys, heads_per_task;
  float* parts = nullptr;                    // (tasks, part_floats); null where no tile has several chunks
  std::atomic<int32_t>* arrivals = nullptr;  // (tasks), zeros: those of a tile's first chunk count its parts

  int64_t group() const { return query_heads / key_heads; }
  int64_t head_tasks() const { return (key_heads + heads_per_task - 1) / heads_per_task; }
};

/// The kernel of one instruction set, for one storage type.
struct KvCacheKernels {
  int64_t (*part_floats)(const KvCacheKernelProblem&);
  int64_t (*workspace_bytes)(const KvCacheKernelProblem&);
  void (*attend)(const KvCacheKernelProblem&, int64_t task, void* workspace);
};

}  // namespace selfattn::cpu
