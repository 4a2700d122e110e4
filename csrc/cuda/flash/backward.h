// The backward pass as the binding sees it: one call's values, and the launcher.
#pragma once
#include "params.h"

namespace selfattn::cuda {

struct BackwardParams {
  AttentionShape shape;
  AttentionWindow window;
  ElementType element;
  float scale;                        // of the logits
  bool is_deterministic;              // gradients bitwise equal from call to call
  TensorView q, k, v, out, grad_out;  // out, grad_out: (batch, query_length, num_heads, dim_v)
  TensorView grad_q, grad_k, grad_v;  // as q, k, v
  const float* lse;                   // (batch, num_heads, query_length), natural logarithm
  const float* grad_lse;              // the same shape, or null
  SegmentTables segments;             // filled by launch_prepare_segments in the same stream, or all null
  void* workspace;                    // flash_attention_backward_workspace_bytes, 256-byte aligned
};

// Whether a kernel exists for the shape: dim_qk and dim_v multiples of 8, up to 256.
bool flash_attention_backward_supports(const AttentionShape& shape);

// For the preparation of the segments, of whose tables it wants the order of keys: tile sizes of the kernel that will
// run, and the rows of the query tiles whose order it wants too (0: none).
TileSizes flash_attention_backward_tiles(const AttentionShape& shape);
int flash_attention_backward_ordered_queries(const AttentionShape& shape);

// Scratch memory: the float32 sum of grad_q and a few numbers a row. Its contents before the call do not matter.
int64_t flash_attention_backward_workspace_bytes(const BackwardParams& params);

// Throws std::runtime_error if a tensor map cannot be made; otherwise the launch status.
cudaError_t launch_flash_attention_backward(const BackwardParams& params, cudaStream_t stream);

}  // namespace selfattn::cuda
