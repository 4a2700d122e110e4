#pragma once

#include "attention/problem.h"

namespace selfattn {

/// The same problem as PyTorch's own attention kernels take it; differentiable.
/// - Its scale is positive, in the precision of the kernels' scores: they mask a score before they scale it, and -inf
///   times a scale that is not positive is inf or NaN. The sign, or a scale that vanishes there, goes into the query.
/// - The last dimension of q, k and v is contiguous: a tensor whose is not is copied.
AttentionProblem adapted_to_pytorch_kernels(AttentionProblem problem);

}  // namespace selfattn
