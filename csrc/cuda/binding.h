#pragma once

// What the bindings of the forward and the backward share: tensors -> the plain structs of flash/params.h.

#include <ATen/core/Tensor.h>

#include "attention/problem.h"
#include "flash/kernels.h"
#include "integer_view.h"

namespace selfattn::cuda {

/// The family of flash kernels of the current device for a type and a layout, which the constraints of the backend have
/// found.
const FlashKernels& flash_kernels(ElementType element, RowLayout layout);

/// A contiguous tensor, not filled even in PyTorch's deterministic mode, which fills what at::empty makes: the kernels
/// write every element.
at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype, at::Device device);

/// Likewise, of a tensor's shape, dtype and device.
at::Tensor empty_like_contiguous(const at::Tensor& tensor);

/// The tensor (B, S, N, D) itself where every family of that layout can read it: a contiguous last dimension, every
/// other stride positive, and (kAligned) strides and address in steps of 16 bytes; a contiguous copy otherwise
/// (expanded gradients, odd views).
at::Tensor with_kernel_layout(const at::Tensor& tensor, RowLayout layout);

/// Whether with_kernel_layout gives the tensor itself.
bool has_kernel_layout(const at::Tensor& tensor, RowLayout layout);

/// Memory of a caller's (B, S, N, D), contiguous, that kernels are to fill. Where they cannot write it, as it does not
/// start at a multiple of the 16 bytes that they store at a time, they fill rows(), a tensor of its own, which
/// hand_over() copies there behind them.
class ResultMemory {
 public:
  ResultMemory(const at::Tensor& result, bool is_writable);
  const at::Tensor& rows() const { return rows_; }
  void hand_over() const;

 private:
  at::Tensor result_, rows_;
};

TensorView view_of(const at::Tensor& tensor);

AttentionShape shape_of(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value);

/// Integers (rows, columns), or (rows,): one column; of none a view without data.
IntegerView integers_of(const std::optional<at::Tensor>& tensor);

ElementType element_of(const at::Tensor& tensor);

/// Whether PyTorch's matrix products of float32 may round their operands to tf32 now
/// (torch.backends.cuda.matmul.fp32_precision, torch.set_float32_matmul_precision): what holds for them holds for the
/// kernels.
bool allows_tf32();

/// How many SMs PyTorch asks kernels to leave free, for collectives beside them
/// (torch._C._set_sm_carveout_experimental).
int sms_left_free();

/// A query and a scale of the same products for the kernels, whose scale is positive: q' = sign * q, so that dq is
/// sign * dq'. A scale that is 0, or rounds to 0 in float32, clears the query instead. Magnitudes past 1e37, where a
/// softmax has one weight only, count as 1e37: the kernels multiply them by log2(e).
struct ScaledQuery {
  at::Tensor query;
  float scale;
  int sign;
};
ScaledQuery with_positive_scale(const at::Tensor& query, double scale);

/// -1 is unbounded; a causal mask is a window without a right side.
AttentionWindow window_of(bool is_causal, int64_t window_left, int64_t window_right);

/// What the kernels apply of a call: with positions nothing, since the tables of segments hold it.
AttentionWindow window_of(const AttentionProblem& problem);

/// The ids of a call, its positions, and the tiles that a kernel cuts it into. `order_of`: the side whose tiles it
/// takes one after another. With positions the tokens must be in order (OrderedCall).
SegmentProblem segment_problem(const AttentionProblem& problem, const TileSizes& tiles, SegmentSide order_of);

}  // namespace selfattn::cuda
