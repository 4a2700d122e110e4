// What both passes need to know of segment ids, made on the device by one kernel a call: no host read, no
// synchronisation, capturable in a CUDA graph, O(tokens) work a thread block.
//
// Contract. launch_prepare_segments(problem, tables, stream) fills every array below; a kernel launched behind it in
// the same stream reads them. With programmatic dependent launch the reader calls ptx::wait_for_previous_kernel()
// first.
//
// A row (batch b) is in one of two modes. What a mode does not use is undefined in its rows. Each field of
// SegmentTables says what it holds.
//
// kContiguous: every id >= 0 fills one run of neighbouring tokens. Where keys have ids of their own, this is so of the
// ids that both sides have, one run a side, and these come in the same order on both. Query i and key j share a segment
// iff key_begin[b][i] <= j < key_end[b][i], and equally iff query_begin[b][j] <= i < query_end[b][j]. No array ever
// decreases along the row. So a tile [a, c) of queries needs exactly the keys key_begin[a] .. key_end[c - 1] - 1 (none
// if that is empty), and a block [x, y) of keys is unmasked for the whole tile iff x >= key_begin[c - 1] and y <=
// key_end[a]; likewise a tile of keys and a block of queries.
//
// kGeneral: ids in any order. Blocks are told apart by their SegmentBlock (no common segment: skip; both uniform and
// equal: unmasked by ids), pairs by query_ids[i] == key_ids[j].
//
// The causal limit and the window of indices are not in the tables (only in the costs): the kernels apply them on top.
// The window of positions (SegmentProblem::positions) is: there the intervals hold the keys that a query may see, and
// the queries that may see a key. So is all that limits the queries of a KV cache (SegmentProblem::cache), which has
// the intervals of queries alone.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "integer_view.h"

namespace selfattn::cuda {

enum SegmentMode : int { kContiguous = 0, kGeneral = 1 };
enum class SegmentSide { kQueries, kKeys };

constexpr int kQueryPadding = -2, kKeyPadding = -1;

// Ids found in a block of tokens. Empty (all padding): min_id > max_id and signature 0. Uniform, that is one id and no
// padding, iff min_id == max_id.
struct alignas(16) SegmentBlock {
  int min_id, max_id;
  uint64_t signature;  // bit hash(id) of every id in the block
};

struct SegmentTables {
  // (batch) SegmentMode of the row.
  int* mode;

  // kGeneral. (batch, pitch_query), (batch, pitch_key) the ids as int32. Padding is kQueryPadding or kKeyPadding, also
  // past the end of the row, up to the pitch: equality is the whole test.
  int* query_ids;
  int* key_ids;

  // kContiguous. (batch, pitch_query) of each query the keys of its segment, and (batch, pitch_key) of each key the
  // queries. Empty of padding (id < 0), of an id that the other side has not, and past the end of the row, up to the
  // pitch. Where keys have no ids of their own, the second two arrays are the first two.
  int *key_begin, *key_end;
  int *query_begin, *query_end;

  // kGeneral. (batch, query_tiles), (batch, key_tiles) of block t: tokens t * tile .. (t + 1) * tile - 1, those past
  // the end of the row left out.
  SegmentBlock* query_blocks;
  SegmentBlock* key_blocks;

  // (batch, query_tiles or key_tiles) the tiles of the side that SegmentProblem::order_of names, the costliest first.
  int* order;

  // (batch, tiles of ordered_queries rows) the same of query tiles; null without them.
  int* query_order;

  // (batch) blocks of query_tile x key_tile that the row computes, by intervals and window.
  int* computed_blocks;

  // (kTileCounters, params.h) zeros.
  int* counters;

  int pitch_query, pitch_key;  // tokens a row, multiples of kSegmentPitch: rows are 16-byte aligned
  int query_tiles, key_tiles;
};

constexpr int kSegmentPitch = 256;  // a tile of up to 256 tokens that starts inside the row stays inside the pitch
constexpr int kMaxSegmentLength = 1 << 19;  // tokens a row
constexpr int kMaxCacheCapacity = 1 << 23;  // slots of a row of a KV cache, which tables of its queries hold

// What a window compares in the place of indices: query i may see the keys of its segment whose positions are
// of_queries [i] - left .. of_queries[i] + right.
struct SegmentPositions {
  static constexpr int64_t kUnbounded = -1;  // on a side: no limit there

  const int* of_queries = nullptr;  // (batch, query_length), contiguous; null: there are none
  const int* of_keys = nullptr;     // (batch, key_length), contiguous
  int64_t left = kUnbounded, right = kUnbounded;
};

// Queries of a batch row that follow one another in a row of a KV cache.
struct CacheTile {
  int row;
  int first_position;  // of the first query
  int count;           // of queries; those of the batch row behind them see nothing
};

// Rows of a KV cache, of which each batch row has one, in the place of ids: its last query stands at the last slot in
// use. A length that is negative or beyond key_length, and an entry of the page table that names no page while some
// query sees a slot of it, stop the kernel (device assert).
struct CacheRows {
  IntegerView lengths;     // (batch, 1), or with tiles (rows, 1): slots in use; null: there is no cache
  IntegerView page_table;  // (batch, pages of a row), or null
  int page_size = 0, pages = 0;
  int window_left = 0, window_right = 0;  // AttentionWindow
  const CacheTile* tiles = nullptr;       // (batch) which queries a batch row has; null: as many as all, of its own row
};

// The ids and how the kernel that follows will cut the problem.
struct SegmentProblem {
  const void* query_ids;
  const void* key_ids;  // null: the query ids
  bool ids_are_int64;   // of both; a value outside int32 stops the kernel (device assert)
  int64_t query_stride_batch, query_stride_token, key_stride_batch, key_stride_token;  // elements
  int batch, query_length, key_length;
  int query_tile, key_tile;
  int window_left, window_right;  // AttentionWindow, for the costs
  SegmentSide order_of;
  int ordered_queries = 0;  // rows a tile of a second order, of query tiles (query_order); 0: none
  // With these the tokens of either side must stand in order, by id, then by position, and padding behind the others; a
  // row that does not stops the kernel (device assert). Every row is kContiguous then, and key_ids is given.
  SegmentPositions positions = {};
  // With these there are no ids, and every row is kContiguous. Of the tables counters, mode, key_begin, key_end, order
  // and computed_blocks are filled, and no others are there; key_length may be up to kMaxCacheCapacity.
  CacheRows cache = {};

  // Whether the rows may be kGeneral.
  bool may_be_general() const { return !positions.of_queries && !cache.lengths; }
};

// Bytes of one allocation (256-byte aligned) that holds the tables, and the tables laid out in it.
int64_t segment_tables_bytes(const SegmentProblem& problem);
SegmentTables make_segment_tables(const SegmentProblem& problem, void* storage);

// Whether this build holds the kernel for a device.
bool segments_are_built_for(int device);

// On every device that flash kernels serve. Rows without positions that are too long for the shared memory of a thread
// block there (both sides of them, where keys have ids of their own) are kGeneral whatever their ids are.
cudaError_t launch_prepare_segments(const SegmentProblem& problem, const SegmentTables& tables, cudaStream_t stream);

}  // namespace selfattn::cuda
