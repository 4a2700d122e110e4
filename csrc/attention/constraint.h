#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <c10/util/ArrayRef.h>
#include <selfattn/backend.h>

#include "attention/problem.h"

namespace selfattn {

/// Why a backend cannot serve a call, a phrase that completes "<backend> cannot serve this call: ...".
using Reason = std::optional<std::string>;

/// One fact that a backend needs: nothing where the problem meets it, else the reason.
using Constraint = Reason (*)(const AttentionProblem&);

/// A backend as the selection sees it. Its call runs only where no constraint objects; lse is undefined unless
/// `problem.needs_lse`.
struct AttentionBackend {
  Backend name;
  c10::ArrayRef<Constraint> constraints;
  std::tuple<at::Tensor, at::Tensor> (*call)(const AttentionProblem&);
};

/// Every reason why `backend` cannot serve `problem`; empty where it can.
std::vector<std::string> reasons_against(const AttentionBackend& backend, const AttentionProblem& problem);

// Facts that several backends need.
Reason no_function_transform(const AttentionProblem& problem);
Reason no_differentiation_transform(const AttentionProblem& problem);
Reason no_forward_mode_ad(const AttentionProblem& problem);
/// Scores are products times the scale, and nothing else.
Reason scaled_products(const AttentionProblem& problem);
Reason no_sinks(const AttentionProblem& problem);
Reason no_positions(const AttentionProblem& problem);
Reason no_lse_output(const AttentionProblem& problem);
Reason no_empty_tensor(const AttentionProblem& problem);

}  // namespace selfattn
