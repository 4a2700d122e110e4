// Plain values that travel from the bindings (which know tensors) to the launchers (which know no torch header).
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/kernel_limits.h"
#include "flash/segments/tables.h"

namespace selfattn::cuda {

enum class ElementType { kBFloat16, kHalf, kFloat };

// How the rows of a call lie in memory, which its head dimensions decide (row_layout).
enum class RowLayout {
  kAligned,    // in whole chunks of 16 bytes: head dimensions, strides and addresses are multiples of 16 bytes
  kUnaligned,  // from any element on
};

// A (batch, tokens, heads, dim) tensor: any strides (in elements), dim contiguous; data and strides as RowLayout says.
// The stride of a dimension of size 1 is never used.
struct TensorView {
  void* data;
  int64_t stride_batch, stride_token, stride_head;
};

struct AttentionShape {
  int batch, query_length, key_length;
  int num_heads, num_kv_heads;  // query head h reads kv head h / (num_heads / num_kv_heads)
  int dim_qk, dim_v;
};

inline RowLayout row_layout(const AttentionShape& shape, int element_bytes) {
  return are_rows_aligned(shape.dim_qk, shape.dim_v, element_bytes) ? RowLayout::kAligned : RowLayout::kUnaligned;
}

// Query i stands at key position i' = i + key_length - query_length and may see the keys i' - left .. i' + right.
// A causal mask is right = 0. kUnbounded on a side means no limit there.
struct AttentionWindow {
  static constexpr int kUnbounded = 1 << 30;
  int left = kUnbounded, right = kUnbounded;
};

// Where keys and values lie in pages of a KV cache: k and v are then (count, size, num_kv_heads, dim_qk | dim_v), key j
// of batch row b is slot j % size of page table[b][j / size], key_length is all slots of a row, and the segments are
// of a cache (SegmentProblem::cache). Entries of pages that no query sees may be anything.
struct KeyPages {
  IntegerView table;  // (batch, pages_per_row), or null
  int pages_per_row;
  int size;  // slots a page, a multiple of kCachePageMultiple where a row has several
  int count;
};

struct ForwardParams {
  AttentionShape shape;
  AttentionWindow window;
  ElementType element;
  bool allows_tf32;        // kFloat: products of operands rounded to tf32, instead of float32's precision
  float scale;             // of the logits
  TensorView q, k, v;      // (batch, query_length | key_length, num_heads | num_kv_heads, dim_qk | dim_v)
  KeyPages pages;          // without a table k and v are as above
  TensorView out;          // (batch, query_length, num_heads, dim_v)
  float* lse;              // (batch, num_heads, query_length), natural logarithm
  const float* sinks;      // (num_heads,) one more logit a head in the denominator, or null
  SegmentTables segments;  // filled by launch_prepare_segments in the same stream, or all null
  int* counters;           // kTileCounters ints of scratch; segments.counters where there are segments
  int* repair_list;        // scratch, an int for each query tile of each head
  float softcap;           // logits are softcap * tanh(scale * score / softcap); 0: scale * score
  int sms_left_free;       // by kernels that would take all SMs (sm90), for collectives beside them
};

constexpr int kTileCounters = 4;

struct BackwardParams {
  AttentionShape shape;
  AttentionWindow window;
  ElementType element;
  bool allows_tf32;                   // kFloat: products of operands rounded to tf32
  float scale;                        // of the logits
  bool is_deterministic;              // gradients bitwise equal from call to call
  TensorView q, k, v, out, grad_out;  // out, grad_out: (batch, query_length, num_heads, dim_v)
  TensorView grad_q, grad_k, grad_v;  // as q, k, v
  const float* lse;                   // (batch, num_heads, query_length), natural logarithm
  const float* grad_lse;              // the same shape, or null
  SegmentTables segments;             // filled by launch_prepare_segments in the same stream, or all null
  void* workspace;                    // FlashKernels::backward_workspace_bytes of them, 256-byte aligned
  float softcap;                      // logits are softcap * tanh(scale * score / softcap); 0: scale * score
  int sms_left_free;                  // as in the forward pass
};

// Rows of a query tile and of a key tile.
struct TileSizes {
  int query, key;
};

}  // namespace selfattn::cuda
