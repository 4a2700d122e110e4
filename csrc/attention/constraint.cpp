#include "attention/constraint.h"

#include <c10/util/StringUtil.h>

#include "common/function_transform.h"

namespace selfattn {

std::vector<std::string> reasons_against(const AttentionBackend& backend, const AttentionProblem& problem) {
  std::vector<std::string> reasons;
  for (const Constraint constraint : backend.constraints) {
    if (auto reason = constraint(problem)) reasons.push_back(std::move(*reason));
  }
  return reasons;
}

Reason no_function_transform(const AttentionProblem&) {
  if (!is_function_transform_active()) return std::nullopt;
  return "a torch.func transform (vmap, grad, jvp, ...) is active; only reference supports all of those";
}

Reason no_differentiation_transform(const AttentionProblem&) {
  if (!is_differentiation_transform_active()) return std::nullopt;
  return "a torch.func transform other than vmap (grad, jvp, ...) is active; only reference supports those";
}

Reason no_forward_mode_ad(const AttentionProblem& problem) {
  const bool is_dual = has_tangent(problem.query) || has_tangent(problem.key) || has_tangent(problem.value) ||
                       (problem.sinks && has_tangent(*problem.sinks));
  if (!is_dual) return std::nullopt;
  return "an input carries a forward-mode tangent; only reference supports forward-mode differentiation";
}

Reason scaled_products(const AttentionProblem& problem) {
  if (problem.softcap == 0.0) return std::nullopt;
  return c10::str("softcap must be 0; got ", problem.softcap);
}

Reason no_sinks(const AttentionProblem& problem) {
  if (!problem.sinks) return std::nullopt;
  return "sinks must not be given";
}

Reason no_positions(const AttentionProblem& problem) {
  if (!problem.has_positions()) return std::nullopt;
  return c10::str("positions must not be given where ", problem.is_causal ? "causality" : "a window", " reads them");
}

Reason no_lse_output(const AttentionProblem& problem) {
  if (!problem.needs_lse) return std::nullopt;
  return "it gives no differentiable logsumexp";
}

Reason no_empty_tensor(const AttentionProblem& problem) {
  if (problem.query.sym_numel() != 0 && problem.key.sym_numel() != 0 && problem.value.sym_numel() != 0) {
    return std::nullopt;
  }
  return "q, k and v must not be empty";
}

}  // namespace selfattn
