// Attention over a cache of keys and values, as the binding gives it to the launcher.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>

#include "flash/params.h"
#include "integer_view.h"

namespace selfattn::cuda {

// A page holds page_size tokens; columns i of the page table name the pages of tokens i * page_size .. (i + 1) *
// page_size - 1 of a row. Without a table row r has page r alone. Where a row has several pages, page_size is a
// multiple of kPageMultiple.
struct KvCacheParams {
  int batch, queries;  // of q
  int rows;            // of the cache; equal to batch without ids
  int pages, page_size, pages_per_row;
  int num_heads, num_kv_heads;  // query head h reads kv head h / (num_heads / num_kv_heads)
  int dim_qk, dim_v;            // multiples of 8
  AttentionWindow window;       // of positions
  bool is_causal;
  ElementType element;      // kBFloat16 or kHalf
  float scale, softcap;     // as ForwardParams
  int64_t split_keys;       // a multiple of kUnitKeys, or 0: equal shares for all thread blocks
  TensorView q;             // (batch, queries, num_heads, dim_qk)
  TensorView k, v;          // (pages, page_size, num_kv_heads, dim_qk | dim_v)
  void* out;                // (batch, queries, num_heads, dim_v), contiguous
  float* lse;               // (batch, num_heads, queries), natural logarithm
  const void* sinks;        // (num_heads,) contiguous, or null
  ElementType sink_type;    // of sinks
  IntegerView lengths;      // (rows, 1)
  IntegerView page_table;   // (rows, pages_per_row), or null
  IntegerView segment_ids;  // (batch, queries) the row that a query belongs to, negative: none; or null
  bool has_short_rows;      // with ids: a row has few queries, however many there are
  IntegerView positions;    // (batch, queries), or null
  const bool* draft_mask;   // (rows, queries, queries), contiguous, or null; queries <= kMaxDraft, no ids

  int group() const { return num_heads / num_kv_heads; }
};

constexpr int kPageMultiple = kCachePageMultiple, kUnitKeys = kCacheUnitKeys, kMaxDraft = 32;

// So many bytes of device memory, 256-byte aligned, for what the stream is given until the launch returns; what they
// hold does not matter.
using WorkspaceAllocator = std::function<void*(int64_t bytes)>;

// out and lse.
cudaError_t launch_attend_kv_cache(const KvCacheParams& params, const WorkspaceAllocator& allocate,
                                   cudaStream_t stream);

}  // namespace selfattn::cuda
