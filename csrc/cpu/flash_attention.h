#pragma once

#include "attention/gradients.h"
#include "attention/problem.h"

namespace selfattn::cpu {

/// flash_attention on CPU, of a call that flash can serve.
AttentionResults attend(const AttentionProblem& attention);

}  // namespace selfattn::cpu
