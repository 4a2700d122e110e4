#pragma once

#include <optional>

#include "attention/problem.h"

namespace selfattn {

/// The allowed pairs as a boolean tensor that broadcasts to (B, NH, Sq, Skv): (1 or B, 1, Sq, Skv), True where a query
/// may attend to a key; nothing where every pair is allowed. For the backends that read a dense mask.
std::optional<at::Tensor> attention_mask(const AttentionProblem& problem);

}  // namespace selfattn
