// qk_norm_rope whose keys go to a KV cache, and values with them.
#pragma once
#include "integer_view.h"
#include "params.h"

namespace selfattn::cuda {

// (pages, page_size, heads, dim): any strides (in elements) in steps of 16 bytes, dim contiguous, 16-byte aligned.
struct CacheView {
  void* data;
  int64_t stride_page, stride_token, stride_head;
};

struct AppendParams {
  NormRopeParams
      norm_rope;     // sides: q, and k, which has no result; q has no heads where keys and values alone are written
  HeadsView values;  // (batch, length, kv heads, dim_v), of k's batch and length
  int dim_v;         // a multiple of 8
  CacheView key_cache, value_cache;
  int rows, pages, page_size, pages_per_row;  // page_table (rows, pages_per_row); without one, page r is row r
  IntegerView positions;                      // (batch, length) the slot of a token in its row
  IntegerView page_table;                     // or null
  IntegerView segment_ids;  // (batch, length) the row of a token, negative: it is not written; null: row b of batch b
};

// Elements are kBFloat16 or kHalf, and takes_vector_kernel(params.norm_rope). One launch. Values out of range stop the
// device.
cudaError_t launch_qk_norm_rope_append(AppendParams params, cudaStream_t stream);

}  // namespace selfattn::cuda
