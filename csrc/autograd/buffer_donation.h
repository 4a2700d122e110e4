#pragma once

#include "attention/gradients.h"

namespace selfattn {

/// Buffer donation: while one lives, the q, k, v and out of the attention operators that its thread calls are donated
/// to the graph. Nobody else will see them again, and a backward pass that nothing comes after may write gradients over
/// them. self_attention has one around its attention.
class DonatedBuffers {
 public:
  DonatedBuffers();
  ~DonatedBuffers();
  DonatedBuffers(const DonatedBuffers&) = delete;
  DonatedBuffers& operator=(const DonatedBuffers&) = delete;

  /// Whether one lives, and plain memory is at work: no tracing, no hooks that may keep what is saved.
  static bool include(const at::Tensor& tensor);

  /// Whether a backward pass that got these gradients may write over donated buffers: not where a gradient stands for
  /// many (is_grads_batched, vmap) or for something else, since then the buffers are read again or cannot take the
  /// result.
  static bool may_be_written(at::TensorList grads);

 private:
  bool before_;
};

/// What a backward node of the attention may write over, inside its call: nothing where the graph is kept, a second
/// derivative is wanted, or anyone else holds the memory. `key` and `value` are inputs that the node saved, `out` an
/// output, each held by the node and by the caller's list alone; dq has the shape of `query`.
GradientMemory donated_memory(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                              const at::Tensor& out);

}  // namespace selfattn
