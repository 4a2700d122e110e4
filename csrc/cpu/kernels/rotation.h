#pragma once

// Sines and cosines of one token's pairs.
#include <bit>
#include <cstdint>

#include "cpu/qk_norm_rope_kernels.h"

namespace selfattn::cpu {
inline namespace CPU_CAPABILITY {

/// sin and cos of position * quarter_turns[i] quarter turns (rotary.h), i < count. The angle is reduced to pi / 4 at
/// most in float64; the polynomials (Cephes) are within 1 ulp of float32 there. A loop that compilers make vectors of.
inline void compute_rotations(double position, const double* __restrict quarter_turns, int64_t count,
                              float* __restrict sin, float* __restrict cos) {
  constexpr double kRoundToInteger = 6755399441055744.0;  // 1.5 * 2^52: the sum's last bits are the integer
  constexpr double kHalfPi = 1.57079632679489661923;
  for (int64_t i = 0; i < count; ++i) {
    const double angle = position * quarter_turns[i];
    const double shifted = angle + kRoundToInteger;
    const auto quadrant = static_cast<uint32_t>(std::bit_cast<uint64_t>(shifted));
    const float x = static_cast<float>((angle - (shifted - kRoundToInteger)) * kHalfPi);
    const float z = x * x;
    const float s = x + x * z * (-1.6666654611e-1f + z * (8.3321608736e-3f - z * 1.9515295891e-4f));
    const float c =
        1.0f - 0.5f * z + z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f));
    const uint32_t sine = std::bit_cast<uint32_t>(s), cosine = std::bit_cast<uint32_t>(c);
    const uint32_t swaps = 0u - (quadrant & 1u);  // all ones in the odd quadrants
    const uint32_t difference = (sine ^ cosine) & swaps;
    sin[i] = std::bit_cast<float>((sine ^ difference) ^ ((quadrant & 2u) << 30));
    cos[i] = std::bit_cast<float>((cosine ^ difference) ^ (((quadrant + 1u) & 2u) << 30));
  }
}

/// Those of one token at a time, from tables or from positions.
struct TokenRotations {
  const NormRopeProblem& p;
  float* workspace;  // D floats
  const float *sin = nullptr, *cos = nullptr;

  void go_to(int64_t batch, int64_t token) {
    if (!p.has_rope) return;
    const int64_t half = p.rotary_dim / 2, row = batch * p.row_stride + token;
    if (p.sin) {
      sin = p.sin + row * half;
      cos = p.cos + row * half;
      return;
    }
    compute_rotations(p.positions ? p.positions[row] : static_cast<double>(token), p.quarter_turns, half, workspace,
                      workspace + half);
    sin = workspace;
    cos = workspace + half;
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace selfattn::cpu
