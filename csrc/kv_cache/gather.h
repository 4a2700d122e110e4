#pragma once

#include "attention/gradients.h"
#include "kv_cache/problem.h"

namespace selfattn {

/// A call over a cache as attention over dense rows of keys, for what reads no pages: every slot of a row, in order,
/// with 0 in those that no query may see. Without segment ids its batch is R and a row's keys are that row's slots;
/// with them all tokens, and the slots of all rows, are one row. Differentiable in q, the caches and the sinks. Memory
/// of the order of the gathered slots, and of a byte a pair.
struct GatheredProblem {
  AttentionProblem attention;  // without a rule of its own: `allowed` has them all
  at::Tensor allowed;          // (R or 1, 1, queries, keys) bool
};

/// Checks the values of lengths, ids, positions and the table: a ValueError on the CPU, a device assertion elsewhere.
GatheredProblem gather(const KvCacheProblem& problem);

/// The gathered problem's results in the shapes of the call's: (B, Sq, NH, DV) and, where there is one, (B, NH, Sq).
AttentionResults scatter_results(const KvCacheProblem& problem, const AttentionResults& results);

}  // namespace selfattn
