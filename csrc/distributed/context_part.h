#pragma once

#include <selfattn/backend.h>
#include "attention/gradients.h"
#include "attention/problem.h"

// Attention below autograd, by any backend, with a backward pass of its own.

namespace selfattn {

struct PartGradients {
  at::Tensor query, key, value;
  at::Tensor sinks;  // undefined without sinks
};

/// out (B, Sq, NH, DV), contiguous; lse (B, NH, Sq), which only the kernels of flash fill.
AttentionResults attend_part(const AttentionProblem& part, Backend backend);

/// `gradients` as the flash kernels need them, where `out` may be anything for queries of padding. Other backends
/// compute their forward pass again, under autograd.
PartGradients attend_part_backward(const AttentionProblem& part, Backend backend, const AttentionGradients& gradients);

}  // namespace selfattn
