#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <c10/util/ArrayRef.h>
#include <c10/util/StringUtil.h>
#include <selfattn/backend.h>

#include "attention/problem.h"
#include "common/function_transform.h"

namespace selfattn {

/// Why a backend cannot serve a call, a phrase that completes "<backend> cannot serve this call: ...".
using Reason = std::optional<std::string>;

/// One fact that a backend needs: nothing where the problem meets it, else the reason. `Problem`: an AttentionProblem,
/// or a KvCacheProblem.
template <typename Problem>
using ConstraintOn = Reason (*)(const Problem&);
using Constraint = ConstraintOn<AttentionProblem>;

/// A backend as the selection sees it. Its call runs only where no constraint objects; lse is undefined unless
/// `problem.needs_lse`.
template <typename Problem>
struct BackendFor {
  Backend name;
  c10::ArrayRef<ConstraintOn<Problem>> constraints;
  std::tuple<at::Tensor, at::Tensor> (*call)(const Problem&);
};
using AttentionBackend = BackendFor<AttentionProblem>;

/// Every reason why `backend` cannot serve `problem`; empty where it can.
template <typename Problem>
std::vector<std::string> reasons_against(const BackendFor<Problem>& backend, const Problem& problem) {
  std::vector<std::string> reasons;
  for (const ConstraintOn<Problem> constraint : backend.constraints) {
    if (auto reason = constraint(problem)) reasons.push_back(std::move(*reason));
  }
  return reasons;
}

// Facts that several backends need.

Reason no_active_transform();

template <typename Problem>
Reason no_function_transform(const Problem&) {
  return no_active_transform();
}

Reason no_differentiation_transform(const AttentionProblem& problem);

template <typename Problem>
Reason no_forward_mode_ad(const Problem& problem) {
  const bool is_dual = has_tangent(problem.query) || has_tangent(problem.key) || has_tangent(problem.value) ||
                       (problem.sinks && has_tangent(*problem.sinks));
  if (!is_dual) return std::nullopt;
  return "an input carries a forward-mode tangent; only reference supports forward-mode differentiation";
}

/// Scores are products times the scale, and nothing else.
template <typename Problem>
Reason scaled_products(const Problem& problem) {
  if (problem.softcap == 0.0) return std::nullopt;
  return c10::str("softcap must be 0; got ", problem.softcap);
}

template <typename Problem>
Reason no_sinks(const Problem& problem) {
  if (!problem.sinks) return std::nullopt;
  return "sinks must not be given";
}

Reason no_positions(const AttentionProblem& problem);

template <typename Problem>
Reason no_lse_output(const Problem& problem) {
  if (!problem.needs_lse) return std::nullopt;
  return "it gives no differentiable logsumexp";
}

template <typename Problem>
Reason no_empty_tensor(const Problem& problem) {
  if (problem.query.sym_numel() != 0 && problem.key.sym_numel() != 0 && problem.value.sym_numel() != 0) {
    return std::nullopt;
  }
  return "q, k and v must not be empty";
}

}  // namespace selfattn
