// The frequencies of rotary embeddings for contexts that are longer than those of the training before.
#include "rotary/frequencies.h"

#include <c10/util/Exception.h>
#include <c10/util/MathConstants.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string_view>
#include <utility>

#include "rotary/rotary.h"

namespace selfattn {
namespace {

bool contains(const std::vector<std::string_view>& names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

/// The fields beyond rotary_dim and rope_theta: those that a type needs, and those that it may have.
struct TypeFields {
  std::vector<std::string_view> needed, allowed;
};

TypeFields fields_of(const std::string& type) {
  if (type == "default") return {{}, {}};
  if (type == "linear") return {{"factor"}, {}};
  if (type == "dynamic") return {{"factor", "original_max_position_embeddings"}, {}};
  if (type == "llama3") {
    return {{"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}, {}};
  }
  if (type == "yarn") {
    return {{"factor", "original_max_position_embeddings"},
            {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}};
  }
  TORCH_CHECK_VALUE(type == "longrope",
                    "selfattn: rope_type must be default, linear, dynamic, llama3, yarn or longrope; got ", type);
  return {{"original_max_position_embeddings", "short_factor", "long_factor"}, {"factor", "attention_factor"}};
}

void check_divisors(const std::optional<std::vector<double>>& divisors, int64_t pairs, const char* name) {
  if (!divisors) return;
  const bool are_positive = std::all_of(divisors->begin(), divisors->end(),
                                        [](double divisor) { return std::isfinite(divisor) && divisor > 0.0; });
  TORCH_CHECK_VALUE(static_cast<int64_t>(divisors->size()) == pairs && are_positive, "selfattn: ", name, " must have ",
                    pairs, " positive finite numbers, one a pair; got ", c10::ArrayRef<double>(*divisors));
}

double beta_fast(const RopeParameters& of) { return of.beta_fast().value_or(32.0); }
double beta_slow(const RopeParameters& of) { return of.beta_slow().value_or(1.0); }

/// The square root of 1 / t (YaRN, arXiv:2309.00071, section 3.4), with a weight of the logarithm (DeepSeek).
double yarn_scale(double factor, double weight) { return factor > 1.0 ? 0.1 * weight * std::log(factor) + 1.0 : 1.0; }

/// The pairs between which yarn blends, as numbers that need not be whole.
std::pair<double, double> yarn_blend(const RopeParameters& of) {
  const auto pair_of = [&](double turns) {  // the pair that turns so often in the original length
    const double wavelength = static_cast<double>(*of.original_max_position_embeddings()) / turns;
    return static_cast<double>(of.rotary_dim()) * std::log(wavelength / (2.0 * c10::pi<double>)) /
           (2.0 * std::log(of.rope_theta()));
  };
  double first = pair_of(beta_fast(of)), last = pair_of(beta_slow(of));
  if (of.truncate().value_or(true)) first = std::floor(first), last = std::ceil(last);
  // Both bounds as transformers has them: the upper one counts elements, not pairs.
  first = std::max(first, 0.0);
  last = std::min(last, static_cast<double>(of.rotary_dim() - 1));
  return {first, first == last ? last + 0.001 : last};
}

}  // namespace

void check(const RopeParameters& of) {
  check_rotary_dim(of.rotary_dim(), "rotary_dim");
  check_theta(of.rope_theta(), "rope_theta");
  const std::string& type = of.rope_type();
  const TypeFields fields = fields_of(type);
  const auto check_presence = [&](const char* name, bool is_given) {
    const bool is_needed = contains(fields.needed, name);
    TORCH_CHECK_VALUE(is_given || !is_needed, "selfattn: ", name, " must be given for rope_type ", type);
    TORCH_CHECK_VALUE(!is_given || is_needed || contains(fields.allowed, name), "selfattn: ", name,
                      " must not be given for rope_type ", type, ", which does not use it");
  };
  const auto check_number = [&](const char* name, const std::optional<double>& value, bool may_be_zero = false) {
    check_presence(name, value.has_value());
    TORCH_CHECK_VALUE(!value || (std::isfinite(*value) && (*value > 0.0 || (may_be_zero && *value == 0.0))),
                      "selfattn: ", name, " must be finite and ", may_be_zero ? "at least 0" : "positive", "; got ",
                      value.value_or(0.0));
  };
  check_number("factor", of.factor());
  check_number("low_freq_factor", of.low_freq_factor());
  check_number("high_freq_factor", of.high_freq_factor());
  check_number("attention_factor", of.attention_factor());
  check_number("beta_fast", of.beta_fast());
  check_number("beta_slow", of.beta_slow());
  check_number("mscale", of.mscale(), /*may_be_zero=*/true);
  check_number("mscale_all_dim", of.mscale_all_dim(), /*may_be_zero=*/true);
  check_presence("truncate", of.truncate().has_value());
  check_presence("short_factor", of.short_factor().has_value());
  check_presence("long_factor", of.long_factor().has_value());
  check_presence("original_max_position_embeddings", of.original_max_position_embeddings().has_value());
  check_divisors(of.short_factor(), of.rotary_dim() / 2, "short_factor");
  check_divisors(of.long_factor(), of.rotary_dim() / 2, "long_factor");
  const int64_t original = of.original_max_position_embeddings().value_or(2);
  TORCH_CHECK_VALUE(original > 0, "selfattn: original_max_position_embeddings must be positive; got ", original);

  TORCH_CHECK_VALUE(type != "dynamic" || of.rotary_dim() > 2,
                    "selfattn: rotary_dim must be at least 4 for rope_type dynamic, which divides by rotary_dim - 2; "
                    "got ",
                    of.rotary_dim());
  TORCH_CHECK_VALUE(type != "llama3" || *of.high_freq_factor() > *of.low_freq_factor(),
                    "selfattn: high_freq_factor must be more than low_freq_factor, ",
                    of.low_freq_factor().value_or(0.0), "; got ", of.high_freq_factor().value_or(0.0));
  TORCH_CHECK_VALUE(type != "yarn" || of.rope_theta() > 1.0,
                    "selfattn: rope_theta must be more than 1 for rope_type yarn, which divides by its logarithm; got ",
                    of.rope_theta());
  TORCH_CHECK_VALUE(beta_fast(of) >= beta_slow(of), "selfattn: beta_fast must be at least beta_slow, ", beta_slow(of),
                    "; got ", beta_fast(of));
  if (type == "longrope" && !of.attention_factor()) {
    TORCH_CHECK_VALUE(of.factor().has_value(), "selfattn: factor must be given where attention_factor is not");
    TORCH_CHECK_VALUE(original > 1, "selfattn: original_max_position_embeddings must be more than 1; got ", original);
  }
}

bool depends_on_length(const RopeParameters& of) { return of.rope_type() == "dynamic" || of.rope_type() == "longrope"; }

std::vector<double> inverse_frequencies(const RopeParameters& of, int64_t length) {
  const std::string& type = of.rope_type();
  const double factor = of.factor().value_or(1.0), rotary_dim = static_cast<double>(of.rotary_dim());
  const int64_t original = of.original_max_position_embeddings().value_or(1);
  double theta = of.rope_theta();
  if (type == "dynamic") {
    const double stretch = static_cast<double>(std::max(length, original)) / static_cast<double>(original);
    theta *= std::pow(factor * stretch - (factor - 1.0), rotary_dim / (rotary_dim - 2.0));
  }
  std::vector<double> frequencies(of.rotary_dim() / 2);
  for (size_t pair = 0; pair < frequencies.size(); ++pair) {
    frequencies[pair] = std::pow(theta, -static_cast<double>(2 * pair) / rotary_dim);
  }
  // Of each frequency the share `kept`, and the rest of it divided by the factor.
  const auto blend = [&](const auto& kept) {
    for (size_t pair = 0; pair < frequencies.size(); ++pair) {
      const double share = std::clamp(kept(pair), 0.0, 1.0);
      frequencies[pair] *= share + (1.0 - share) / factor;
    }
  };
  if (type == "linear") {
    for (double& frequency : frequencies) frequency /= factor;
  } else if (type == "llama3") {
    const double low = *of.low_freq_factor(), high = *of.high_freq_factor();
    blend([&](size_t pair) {
      const double turns = static_cast<double>(original) / (2.0 * c10::pi<double>)*frequencies[pair];
      return (turns - low) / (high - low);
    });
  } else if (type == "yarn") {
    const auto [first, last] = yarn_blend(of);
    blend([first = first, last = last](size_t pair) {
      return 1.0 - (static_cast<double>(pair) - first) / (last - first);
    });
  } else if (type == "longrope") {
    const std::vector<double>& divisors = length > original ? *of.long_factor() : *of.short_factor();
    std::transform(frequencies.begin(), frequencies.end(), divisors.begin(), frequencies.begin(), std::divides<>());
  }
  return frequencies;
}

double attention_factor(const RopeParameters& of) {
  if (of.attention_factor()) return *of.attention_factor();
  const double factor = of.factor().value_or(1.0);
  if (of.rope_type() == "yarn") {
    const double scale = of.mscale().value_or(0.0), scale_all = of.mscale_all_dim().value_or(0.0);
    if (scale != 0.0 && scale_all != 0.0) return yarn_scale(factor, scale) / yarn_scale(factor, scale_all);
    return yarn_scale(factor, 1.0);
  }
  if (of.rope_type() == "longrope" && factor > 1.0) {
    const auto original = static_cast<double>(*of.original_max_position_embeddings());
    return std::sqrt(1.0 + std::log(factor) / std::log(original));
  }
  return 1.0;
}

}  // namespace selfattn
