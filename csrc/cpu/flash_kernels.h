#pragma once

// What the CPU kernels read and write, as plain values: the kernels are compiled once for each instruction set and know
// no tensor. Work is a number of tasks that may run in any order on any thread; each thread has a workspace.
#include <cstdint>

#include "cpu/pair_plan.h"

namespace selfattn::cpu {

constexpr int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

/// A (B, S, N, D) tensor whose last dimension is contiguous; strides in elements.
struct TokenView {
  void* data = nullptr;
  int64_t batch_stride = 0, token_stride = 0, head_stride = 0;

  template <typename T>
  T* at(int64_t batch, int64_t token, int64_t head) const {
    return static_cast<T*>(data) + batch * batch_stride + token * token_stride + head * head_stride;
  }
};

/// C (m x n, float) = or += A (m x k) * B (k x n), n a multiple of 16 up to kPanel. Leading dimensions count elements
/// of A, columns of B and elements of C. Where A and B have 16 bits, k is even and rows 2i and 2i + 1 of B are
/// interleaved ("VNNI").
using PanelGemm = void (*)(int64_t m, int64_t n, int64_t k, const void* a, int64_t lda, const void* b, int64_t ldb,
                           float* c, int64_t ldc, bool accumulate);

constexpr int64_t kColumns = 16;  // products compute multiples of this many columns

/// A call's shapes, options and inputs.
struct FlashProblem {
  int64_t batch, query_length, key_length, query_heads, key_heads, head_dim, value_dim;
  float scale, softcap;
  TokenView query, key, value;
  const int32_t *query_ids, *key_ids;  // (B, Sq), (B, Skv) or null
  const PairPlan* plan;
  PanelGemm gemm;    // null: the kernels' own
  int64_t key_step;  // products take keys in multiples of this: kColumns, or kPanel to keep their shapes few
  int64_t row_step;  // and rows in multiples of this

  int64_t group() const { return query_heads / key_heads; }
  int64_t tiles() const { return static_cast<int64_t>(plan->tiles.size()); }
  int64_t blocks() const { return plan->blocks; }
  int64_t key_tokens() const { return plan->blocks * kPanel; }
};

/// Operands are packed for all tokens of a key head at once, keys rounded up to whole blocks and filled with zeros:
///   transposed: [block][dim][kPanel]           B of (rows x dim) * (dim x keys)
///   rows:       [panel of dim][key][width]     B of (rows x keys) * (keys x dim); width kPanel, the last one narrower
struct ForwardProblem : FlashProblem {
  const float* sinks;  // (NH,) or null
  TokenView out;
  float* lse;                         // (B, NH, Sq)
  void *key_transposed, *value_rows;  // packed, (B, NKV, ...); null: each task packs what it reads
  int64_t splits;                     // parts that the keys of a tile are split into
  float* parts;                       // (NKV, tiles, splits, part_floats): each part's state, to be merged; null for one
};

struct BackwardProblem : FlashProblem {
  TokenView out, grad_out;
  const float *lse, *grad_lse;                          // (B, NH, Sq); grad_lse or null
  TokenView grad_query, grad_key, grad_value;
  void *key_transposed, *value_transposed, *key_rows;   // packed, (B, NKV, ...)
  char* query_tiles;                                    // (NKV, tiles, query_tile_bytes)
};

/// The kernels of one instruction set, for one storage type (of the tensors) and compute type (of the products).
struct FlashKernels {
  int64_t compute_bytes;  // of an element of a product's operands
  // Elements of one key head's packed operand of `dim` columns, bytes of a query tile, floats of a part.
  int64_t (*transposed_elements)(const FlashProblem&, int64_t dim);
  int64_t (*rows_elements)(const FlashProblem&, int64_t dim);
  int64_t (*query_tile_bytes)(const FlashProblem&);
  int64_t (*part_floats)(const FlashProblem&);

  int64_t (*forward_workspace_bytes)(const ForwardProblem&);
  void (*pack_forward)(const ForwardProblem&, int64_t task, void* workspace);  // (B, NKV, blocks)
  void (*attend)(const ForwardProblem&, int64_t task, void* workspace);        // (NKV, tiles, splits)
  void (*merge)(const ForwardProblem&, int64_t task, void* workspace);         // (NKV, tiles)

  // With `whole_heads` as head_gradients needs it, else as the others do.
  int64_t (*backward_workspace_bytes)(const BackwardProblem&, bool whole_heads);
  void (*pack_backward_keys)(const BackwardProblem&, int64_t task, void* workspace);  // (B, NKV, blocks)
  void (*pack_backward_queries)(const BackwardProblem&, int64_t task, void* workspace);  // (NKV, tiles)
  int64_t (*key_spans)(const FlashProblem&);
  // Either all gradients of a key head and its group at once, or those of keys and of queries on their own: more work,
  // and more tasks.
  void (*head_gradients)(const BackwardProblem&, int64_t task, void* workspace);   // (B, NKV)
  void (*key_gradients)(const BackwardProblem&, int64_t task, void* workspace);    // (B, NKV, key spans)
  void (*query_gradients)(const BackwardProblem&, int64_t task, void* workspace);  // (NKV, tiles)
};

}  // namespace selfattn::cpu
