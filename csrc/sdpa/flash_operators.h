#pragma once

#include <ATen/core/stack.h>

#include <optional>

#include "sdpa/arguments.h"

namespace selfattn::sdpa {

/// One of PyTorch's flash attention operators over those of selfattn: arguments, layouts and results translated.
struct FlashOperator {
  const char* name;
  at::ArrayRef<Name> required;  // arguments that its schema must have
  size_t num_results;
  /// What the operator returns, or nothing where selfattn cannot serve the call. No value of a tensor is read.
  std::optional<torch::jit::Stack> (*serve)(const Arguments&);
};

/// The four operators that an implementation of flash attention replaces.
at::ArrayRef<FlashOperator> flash_operators();

}  // namespace selfattn::sdpa
