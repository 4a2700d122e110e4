#pragma once

#include <ATen/core/function_schema.h>
#include <ATen/core/ivalue.h>

#include <array>
#include <vector>

#include "common/optional_tensor.h"

namespace selfattn::sdpa {

/// The arguments of PyTorch's flash attention operators that have a meaning here.
enum class Name : size_t {
  kGradOut,
  kQuery,
  kKey,
  kValue,
  kOut,
  kLogsumexp,
  kCumSeqQ,
  kCumSeqK,
  kDropout,
  kIsCausal,
  kReturnDebugMask,
  kScale,
  kWindowLeft,
  kWindowRight,
  kCount,
};

/// Where an operator has these arguments, by their names in its schema: schemas grow from one minor of PyTorch to the
/// next.
class ArgumentPositions {
 public:
  explicit ArgumentPositions(const c10::FunctionSchema& schema);

  bool has(Name name) const { return positions_[static_cast<size_t>(name)] >= 0; }

 private:
  friend class Arguments;

  struct Unknown {
    size_t position;
    c10::IValue default_value;  // None where the schema has none
  };

  std::array<int, static_cast<size_t>(Name::kCount)> positions_;  // -1: the operator has no such argument
  std::vector<Unknown> unknown_;
};

/// The arguments of one call. One that is None, undefined or not of this operator counts as not given.
class Arguments {
 public:
  Arguments(const ArgumentPositions& positions, at::ArrayRef<c10::IValue> values)
      : positions_(positions), values_(values) {}

  /// Whether an argument whose meaning nobody here knows is given, and is not its default.
  bool has_unknown() const;

  const at::Tensor& tensor(Name name) const;  ///< which must be given
  OptionalTensor optional_tensor(Name name) const;
  bool flag(Name name) const;
  double number(Name name) const;  ///< 0 where not given
  std::optional<double> optional_number(Name name) const;
  int64_t window(Name name) const;  ///< -1 (unbounded) where not given or negative

 private:
  const c10::IValue* find(Name name) const;

  const ArgumentPositions& positions_;
  at::ArrayRef<c10::IValue> values_;
};

const char* to_string(Name name);

}  // namespace selfattn::sdpa
