// What both passes need to know of segment ids, made on the device by one kernel a call: no host read, no
// synchronisation, capturable in a CUDA graph, O(tokens) work a thread block.
//
// Contract. launch_prepare_segments(problem, tables, stream) fills every array below; a kernel launched behind it in
// the same stream reads them. With programmatic dependent launch the reader calls ptx::wait_for_previous_kernel()
// first.
//
//   mode[b] == kContiguous   (only without separate key ids) every id >= 0 fills one run of neighbouring tokens. Then
//                            query i and key j share a segment iff run_begin[b][i] <= j < run_end[b][i], and equally
//                            iff run_begin[b][j] <= i < run_end[b][j]. For padding (id < 0) the run is the empty [i,
//                            i). Both arrays never decrease along the row, so tile [a, c) needs exactly the tokens
//                            run_begin[a] .. run_end[c - 1] - 1 (none if empty), and a block [x, y) on the other side
//                            is unmasked for the whole tile iff x >= run_begin[c - 1] and y <= run_end[a].
//   mode[b] == kGeneral      ids in any order: blocks are tested by their SegmentBlock (no common segment: skip; both
//                            uniform and equal: unmasked by ids), and pairs by query_ids[i] == key_ids[j].
//   query_ids, key_ids       the ids as int32; padding is kQueryPadding / kKeyPadding, so that equality is the whole
//   test. query_blocks, key_blocks block t covers tokens t * tile .. (t + 1) * tile - 1, those past the end left out.
//   What a mode does not use is undefined in rows of that mode: run_begin and run_end belong to kContiguous, ids and
//   blocks to kGeneral. Past the end of a row, up to the pitch, ids are padding and runs are empty. order[b] the tiles
//   of the side named by `order_of` by falling cost (longest first). counters                 kTileCounters (params.h)
//   zeros.
// The causal limit and the window are not in the tables (only in the costs): the kernels apply them on top.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

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
  int* mode;                   // (batch)
  int* query_ids;              // (batch, pitch_query)
  int* key_ids;                // (batch, pitch_key); the same values as query_ids but for the padding
  int* run_begin;              // (batch, pitch_query)
  int* run_end;                // (batch, pitch_query)
  SegmentBlock* query_blocks;  // (batch, query_tiles)
  SegmentBlock* key_blocks;    // (batch, key_tiles)
  int* order;                  // (batch, query_tiles or key_tiles)
  int* query_order;            // (batch, tiles of ordered_queries rows), null without them
  int* visits;                 // (batch) blocks of query_tile x key_tile that the row visits, by runs and window
  int* counters;
  int pitch_query, pitch_key;  // tokens a row, multiples of kSegmentPitch: rows are 16-byte aligned
  int query_tiles, key_tiles;
};

constexpr int kSegmentPitch = 256;  // a tile of up to 256 tokens that starts inside the row stays inside the pitch
constexpr int kMaxSegmentLength = 1 << 19;  // tokens a row

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
};

// Bytes of one allocation (256-byte aligned) that holds the tables, and the tables laid out in it.
int64_t segment_tables_bytes(const SegmentProblem& problem);
SegmentTables make_segment_tables(const SegmentProblem& problem, void* storage);

cudaError_t launch_prepare_segments(const SegmentProblem& problem, const SegmentTables& tables, cudaStream_t stream);

}  // namespace selfattn::cuda
