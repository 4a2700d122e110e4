#pragma once

/// Rotary tables of long-context models: the operator rope_tables as a C++ function, and what describes one layer's
/// rotation, under the names of transformers' rope_parameters. selfattn.RopeParameters in Python has the formulas.

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <ATen/core/Tensor.h>
#include <selfattn/export.h>
#include <torch/arg.h>

namespace selfattn {

/// The rotary embedding of one layer. A field that the type does not use is not given.
struct RopeParameters {
  /// The plain rotation of so many elements.
  /* implicit */ RopeParameters(int64_t rotary_dim) : rotary_dim_(rotary_dim) {}

  /// R, the first elements of a head, those that rotate; even.
  TORCH_ARG(int64_t, rotary_dim);
  /// "default", "linear", "dynamic", "llama3", "yarn" or "longrope".
  TORCH_ARG(std::string, rope_type) = "default";
  TORCH_ARG(double, rope_theta) = 10000.0;  ///< base of the frequencies
  /// By how much the context is longer than the original one.
  TORCH_ARG(std::optional<double>, factor);
  /// The original length, in tokens.
  TORCH_ARG(std::optional<int64_t>, original_max_position_embeddings);
  TORCH_ARG(std::optional<double>, low_freq_factor);   ///< pairs of fewer turns in the original length slow down
  TORCH_ARG(std::optional<double>, high_freq_factor);  ///< pairs of more turns stay as they are
  /// Of sines and cosines alike; where not given it follows the other fields (yarn, longrope).
  TORCH_ARG(std::optional<double>, attention_factor);
  TORCH_ARG(std::optional<double>, beta_fast);                  ///< 32 where not given
  TORCH_ARG(std::optional<double>, beta_slow);                  ///< 1 where not given
  TORCH_ARG(std::optional<double>, mscale);                     ///< of yarn's attention factor
  TORCH_ARG(std::optional<double>, mscale_all_dim);             ///< of yarn's attention factor
  TORCH_ARG(std::optional<bool>, truncate);                     ///< true where not given
  TORCH_ARG(std::optional<std::vector<double>>, short_factor);  ///< R / 2 divisors of the frequencies
  TORCH_ARG(std::optional<std::vector<double>>, long_factor);   ///< the same beyond the original length
};

/// What a call of rope_tables may leave out. Exactly one of positions and max_length is given.
struct RopeTablesOptions {
  TORCH_ARG(std::optional<at::Tensor>, positions);  ///< (S,) or (B, S)
  TORCH_ARG(std::optional<int64_t>, max_length);    ///< positions 0 .. max_length - 1
  /// The largest position plus 1, which "dynamic" and "longrope" depend on; S where not given.
  TORCH_ARG(std::optional<int64_t>, length);
  TORCH_ARG(std::optional<at::ScalarType>, dtype);  ///< float32 where not given
  TORCH_ARG(std::optional<at::Device>, device);     ///< that of positions, or the CPU, where not given
};

/// Rotary tables (sin, cos), each (1 or B, S, R / 2), times the attention factor. Throws c10::ValueError that names the
/// field, what was expected and what came.
SELFATTN_API std::tuple<at::Tensor, at::Tensor> rope_tables(const RopeParameters& parameters,
                                                            const RopeTablesOptions& options);

}  // namespace selfattn
