#pragma once

// What the CPU kernels read and write, as plain values: the kernels are compiled once for each instruction set and know
// no tensor. Work is a number of tasks that may run in any order on any thread; each thread has a workspace.
#include <cstdint>

#include "cpu/pair_table.h"

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

/// C (m x n, float) = or += A (m x k) * B (k x n). Leading dimensions count elements of A, columns of B and elements of
/// C. Where A and B have 16 bits, k is even and rows 2i and 2i + 1 of B are interleaved ("VNNI").
using PanelGemm = void (*)(int64_t m, int64_t n, int64_t k, const void* a, int64_t lda, const void* b, int64_t ldb,
                           float* c, int64_t ldc, bool accumulate);

/// The kernels of one instruction set for each storage type.
template <typename Kernels>
struct ByDtype {
  Kernels of_float, of_bfloat16, of_half;
};

constexpr int64_t kColumns = 16;  // products compute multiples of this many columns

/// A call's shapes, options and inputs.
struct FlashProblem : PairRules {
  int64_t query_heads, key_heads, head_dim, value_dim;
  double scale, softcap;
  TokenView query, key, value;
  const PairTable* pair_table;
  PanelGemm matrix_unit;  // for large products; null: the kernels compute all of them

  int64_t tiles() const { return pair_table->tiles; }
  int64_t blocks() const { return pair_table->blocks; }
  int64_t heads() const { return batch * key_heads; }
  int64_t key_tokens() const { return pair_table->blocks * kPanel; }
};

/// A head is an index into (B, NKV). Work goes through the heads in waves, each in packed memory of the same place, so
/// that it stays in the caches. Operands are packed for all tokens of a head, keys rounded up to whole blocks and
/// filled with zeros:
///   transposed: [block][dim][kPanel]           B of (rows x dim) * (dim x keys)
///   rows:       [panel of dim][key][width]     B of (rows x keys) * (keys x dim); width kPanel, the last one narrower
struct ForwardProblem : FlashProblem {
  const float* sinks = nullptr;  // (NH,) or null
  TokenView out;
  float* lse = nullptr;  // (B, NH, Sq)
  // Packed, of the heads from first_head on; null: each task packs what it reads.
  int64_t first_head = 0;
  void *key_transposed = nullptr, *value_rows = nullptr;
  uint64_t* nonfinite_values = nullptr;  // (heads, blocks): the bits of find_nonfinite_rows
  // The keys of a tile are split into parts, each of which leaves its state, to be merged.
  int64_t splits = 1;
  float* parts = nullptr;  // (heads, tiles, splits, part_floats); null where splits == 1
};

struct BackwardProblem : FlashProblem {
  TokenView out, grad_out;
  const float *lse = nullptr, *grad_lse = nullptr;  // (B, NH, Sq); grad_lse or null
  TokenView grad_query, grad_key, grad_value;
  // Packed, of the heads from first_head on.
  int64_t first_head = 0;
  void *key_transposed = nullptr, *value_transposed = nullptr, *key_rows = nullptr;
  uint64_t* nonfinite_keys = nullptr;  // (heads, blocks): the bits of find_nonfinite_rows
  char* query_tiles = nullptr;         // (heads, tiles, query_tile_bytes)
  float* grad_queries = nullptr;       // (tiles, kTileRows, columns) of one head, where all its gradients are summed up
};

/// The kernels of one instruction set, for one storage type (of the tensors) and compute type (of the products).
struct FlashKernels {
  int64_t compute_bytes;  // of an element of a product's operands
  // Elements of one key head's packed operand of `dim` columns, bytes of a query tile, floats of a part.
  int64_t (*transposed_elements)(const FlashProblem&, int64_t dim);
  int64_t (*rows_elements)(const FlashProblem&, int64_t dim);
  int64_t (*query_tile_bytes)(const FlashProblem&);
  int64_t (*part_floats)(const FlashProblem&);

  // Either a head at once, packing included, or in steps, for which packed memory is needed ahead.
  int64_t (*head_forward_workspace_bytes)(const ForwardProblem&);
  void (*attend_head)(const ForwardProblem&, int64_t task, void* workspace);  // (heads,)

  int64_t (*forward_workspace_bytes)(const ForwardProblem&);
  void (*pack_forward)(const ForwardProblem&, int64_t task, void* workspace);  // (heads, blocks)
  void (*attend)(const ForwardProblem&, int64_t task, void* workspace);        // (heads, tiles, splits)
  void (*merge)(const ForwardProblem&, int64_t task, void* workspace);         // (heads, tiles)

  // Either all gradients of a head, packing included, or those of keys and of queries apart: more work, more tasks.
  int64_t (*head_workspace_bytes)(const BackwardProblem&);
  void (*head_gradients)(const BackwardProblem&, int64_t task, void* workspace);  // (heads,)

  int64_t (*backward_workspace_bytes)(const BackwardProblem&);
  int64_t (*key_spans)(const FlashProblem&);
  void (*pack_keys)(const BackwardProblem&, int64_t task, void* workspace);        // (heads, blocks)
  void (*pack_queries)(const BackwardProblem&, int64_t task, void* workspace);     // (heads, tiles)
  void (*key_gradients)(const BackwardProblem&, int64_t task, void* workspace);    // (heads, key spans)
  void (*query_gradients)(const BackwardProblem&, int64_t task, void* workspace);  // (heads, tiles)
};

}  // namespace selfattn::cpu
