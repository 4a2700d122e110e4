#pragma once

#include "attention/gradients.h"

namespace selfattn {

/// While one lives, nobody outside the attention operators that its thread calls will see their q, k, v or out again,
/// save the graph: a backward pass that nothing comes after may then write gradients over them. self_attention has one
/// around its attention.
class OwnedHeads {
 public:
  OwnedHeads();
  ~OwnedHeads();
  OwnedHeads(const OwnedHeads&) = delete;
  OwnedHeads& operator=(const OwnedHeads&) = delete;

  /// Whether one lives, and plain memory is at work: no tracing, no hooks that may keep what is saved.
  static bool are(const at::Tensor& heads);

  /// Whether a backward pass that got these gradients may write over owned heads: not where a gradient stands for many
  /// (is_grads_batched, vmap) or for something else, since then the heads are read again or cannot take the result.
  static bool are_free(at::TensorList grads);

 private:
  bool before_;
};

/// What a backward node of the attention may write over, inside its call: nothing where the graph is kept, a second
/// derivative is wanted, or anyone else holds the memory. `key` and `value` are inputs that the node saved, `out` an
/// output, each held by the node and by the caller's list alone; dq has the shape of `query`.
GradientMemory memory_of_heads(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               const at::Tensor& out);

}  // namespace selfattn
