#include "sdpa/arguments.h"

#include <algorithm>

namespace selfattn::sdpa {
namespace {

constexpr const char* kNames[] = {"grad_out",
                                  "query",
                                  "key",
                                  "value",
                                  "out",
                                  "logsumexp",
                                  "cum_seq_q",
                                  "cum_seq_k",
                                  "dropout_p",
                                  "is_causal",
                                  "return_debug_mask",
                                  "scale",
                                  "window_size_left",
                                  "window_size_right"};
static_assert(std::size(kNames) == static_cast<size_t>(Name::kCount));

/// Known, and without a meaning: the state of dropout, which is not served, and lengths that nothing here needs.
constexpr const char* kUnread[] = {"max_q", "max_k", "rng_state", "unused", "philox_seed", "philox_offset"};

bool is_given(const c10::IValue& value) {
  return !value.isNone() && !(value.isTensor() && !value.toTensor().defined());
}

}  // namespace

const char* to_string(Name name) { return kNames[static_cast<size_t>(name)]; }

ArgumentPositions::ArgumentPositions(const c10::FunctionSchema& schema) {
  positions_.fill(-1);
  const auto& arguments = schema.arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& name = arguments[i].name();
    if (const auto known = std::find(std::begin(kNames), std::end(kNames), name); known != std::end(kNames)) {
      positions_[known - std::begin(kNames)] = static_cast<int>(i);
    } else if (std::find(std::begin(kUnread), std::end(kUnread), name) == std::end(kUnread)) {
      unknown_.push_back({i, arguments[i].default_value().value_or(c10::IValue())});
    }
  }
}

bool Arguments::has_unknown() const {
  return std::any_of(positions_.unknown_.begin(), positions_.unknown_.end(), [&](const auto& unknown) {
    const c10::IValue& value = values_[unknown.position];
    return is_given(value) && (value.isTensor() || value != unknown.default_value);
  });
}

const c10::IValue* Arguments::find(Name name) const {
  const int position = positions_.positions_[static_cast<size_t>(name)];
  return position >= 0 && is_given(values_[position]) ? &values_[position] : nullptr;
}

const at::Tensor& Arguments::tensor(Name name) const {
  const c10::IValue* value = find(name);
  TORCH_CHECK_VALUE(value, "selfattn: ", to_string(name), " must be a tensor; got none");
  return value->toTensor();
}

OptionalTensor Arguments::optional_tensor(Name name) const {
  const c10::IValue* value = find(name);
  return value ? OptionalTensor(value->toTensor()) : std::nullopt;
}

bool Arguments::flag(Name name) const {
  const c10::IValue* value = find(name);
  return value && value->toBool();
}

double Arguments::number(Name name) const { return optional_number(name).value_or(0.0); }

std::optional<double> Arguments::optional_number(Name name) const {
  const c10::IValue* value = find(name);
  return value ? std::optional(value->toDouble()) : std::nullopt;
}

int64_t Arguments::window(Name name) const {
  const c10::IValue* value = find(name);
  return value ? std::max(value->toSymInt().guard_int(__FILE__, __LINE__), int64_t{-1}) : -1;
}

}  // namespace selfattn::sdpa
