#pragma once

#include <optional>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "common/optional_tensor.h"

namespace selfattn {

/// How a head's first R elements, those that rotate, pair up: (2i, 2i + 1), as in the RoFormer paper, or (i, i + R /
/// 2), as Hugging Face stores its checkpoints.
enum class RotaryPairing { kInterleaved, kHalf };

/// Reads "interleaved" or "half"; throws c10::ValueError otherwise. `name` is the argument's, for the message.
RotaryPairing parse_pairing(c10::string_view text, const char* name);

/// The pairing's text, as parse_pairing reads it.
std::string_view to_string(RotaryPairing pairing);

/// The angle of one position for each pair of a head, theta^(-2i / D) radians, in quarter turns: units of pi / 2, whose
/// nearest integer is the quadrant, so that kernels reduce an angle by rounding it. Kept for the thread's next call.
const std::vector<double>& quarter_turns(int64_t head_dim, double theta);

/// The sines and cosines that rotate the pairs of a head's first R elements at each position, R <= D. Both may carry a
/// factor: sin^2 + cos^2 need not be 1.
struct RotaryTables {
  at::Tensor sin;  // (1 or B, S, R / 2)
  at::Tensor cos;  // (1 or B, S, R / 2)
};

/// Tables of positions (S,) or (B, S): angle = position / theta^(2i / D) (RoFormer, arXiv:2104.09864, eq. 15), float64.
RotaryTables rotary_tables(const at::Tensor& positions, int64_t head_dim, double theta);

/// The same with R / 2 frequencies of one token's step, float64, on the device of the positions.
RotaryTables rotary_tables(const at::Tensor& positions, const at::Tensor& frequencies);

/// What precompute_freqs and rope_tables are given, checked: positions (S,) or (B, S), called `name`, or those of
/// 0 .. max_length - 1, on the device.
at::Tensor table_positions(int64_t rotary_dim, const OptionalTensor& positions, const char* name,
                           const std::optional<c10::SymInt>& max_length, std::optional<at::ScalarType> dtype,
                           std::optional<at::Device> device);

/// Throws where so many elements of a head cannot rotate. `name` is the argument's.
void check_rotary_dim(int64_t rotary_dim, const char* name);

/// Throws where theta is no base of finite frequencies. `name` is the argument's.
void check_theta(double theta, const char* name);

/// Throws where `positions` are no numbers on an axis. `name` is the argument's.
void check_positions_dtype(const at::Tensor& positions, const char* name);

/// Rotates the pairs of x (B, S, N, D) by the tables, and leaves the elements from R on; computes and gives back at
/// least float32.
at::Tensor rotate(const at::Tensor& x, const RotaryTables& tables, RotaryPairing pairing);

}  // namespace selfattn
