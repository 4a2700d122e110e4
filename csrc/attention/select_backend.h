#pragma once

#include <array>

#include <c10/util/Exception.h>

#include "attention/constraint.h"

namespace selfattn {

// One a file in csrc/backend/.
const AttentionBackend& flash_backend();
const AttentionBackend& cudnn_backend();
const AttentionBackend& aten_backend();
const AttentionBackend& reference_backend();

/// The one of that name, which is not kAuto.
template <typename Problem>
const BackendFor<Problem>& find_by_name(Backend name, c10::ArrayRef<const BackendFor<Problem>*> backends) {
  for (const BackendFor<Problem>* backend : backends) {
    if (backend->name == name) return *backend;
  }
  TORCH_INTERNAL_ASSERT(false, "auto names no single backend");
}

/// The backend of that name, which is not kAuto. Every kind of problem has an overload.
const AttentionBackend& find_backend(Backend name, const AttentionProblem& problem);

/// Throws c10::NotImplementedError with the reasons, where there are any.
void check_can_serve(Backend name, const std::vector<std::string>& reasons);

/// Those of each backend, in `auto`'s order, as lines: chosen, able, or every reason why it is not.
std::string explain_selection(std::optional<Backend> chosen,
                              const std::array<std::vector<std::string>, kBackendsByPreference.size()>& reasons);

/// The first backend in `auto`'s order that can serve `problem`.
template <typename Problem>
std::optional<Backend> first_able(const Problem& problem) {
  for (const Backend name : kBackendsByPreference) {
    if (reasons_against(find_backend(name, problem), problem).empty()) return name;
  }
  return std::nullopt;
}

/// The backend named, or the first in `auto`'s order that can serve `problem`.
/// Throws c10::NotImplementedError with every reason where the named one cannot.
template <typename Problem>
const BackendFor<Problem>& select_backend(Backend name, const Problem& problem) {
  if (name == Backend::kAuto) {
    const auto able = first_able(problem);
    TORCH_INTERNAL_ASSERT(able, "reference serves every valid call");
    return find_backend(*able, problem);
  }
  const BackendFor<Problem>& backend = find_backend(name, problem);
  check_can_serve(name, reasons_against(backend, problem));
  return backend;
}

/// One line a backend: chosen, able, or every reason why it is not.
template <typename Problem>
std::string explain_selection(Backend name, const Problem& problem) {
  std::array<std::vector<std::string>, kBackendsByPreference.size()> reasons;
  for (size_t i = 0; i < reasons.size(); ++i) {
    reasons[i] = reasons_against(find_backend(kBackendsByPreference[i], problem), problem);
  }
  return explain_selection(name == Backend::kAuto ? first_able(problem) : std::optional<Backend>(name), reasons);
}

}  // namespace selfattn
