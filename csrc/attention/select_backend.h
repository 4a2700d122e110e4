#pragma once

#include "attention/constraint.h"

namespace selfattn {

// One a file in csrc/backend/.
const AttentionBackend& flash_backend();
const AttentionBackend& cudnn_backend();
const AttentionBackend& aten_backend();
const AttentionBackend& reference_backend();

/// The backend named, or the first in `auto`'s order that can serve `problem`.
/// Throws c10::NotImplementedError with every reason where the named one cannot.
const AttentionBackend& select_backend(Backend name, const AttentionProblem& problem);

/// One line a backend: chosen, able, or every reason why it is not.
std::string explain_selection(Backend name, const AttentionProblem& problem);

}  // namespace selfattn
