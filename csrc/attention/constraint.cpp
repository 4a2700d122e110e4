#include "attention/constraint.h"

namespace selfattn {

Reason no_active_transform() {
  if (!is_function_transform_active()) return std::nullopt;
  return "a torch.func transform (vmap, grad, jvp, ...) is active; only reference supports all of those";
}

Reason no_differentiation_transform(const AttentionProblem&) {
  if (!is_differentiation_transform_active()) return std::nullopt;
  return "a torch.func transform other than vmap (grad, jvp, ...) is active; only reference supports those";
}

Reason no_positions(const AttentionProblem& problem) {
  if (!problem.has_positions()) return std::nullopt;
  return c10::str("positions must not be given where ", problem.is_causal ? "causality" : "a window", " reads them");
}

}  // namespace selfattn
