#pragma once

// What the CPU kernels of qk_norm_rope read and write, as plain values. Work is a range of tokens; ranges may run in
// any order on any thread.
#include <cstdint>

#include "cpu/flash_kernels.h"

namespace selfattn::cpu {

/// One of q and k. A token is an index into (B, S).
struct NormRopeProblem {
  int64_t batch, length, heads, dim;
  TokenView input;         // (B, S, N, D); forward, and backward with the norm
  TokenView grad;          // (B, S, N, D); backward
  void* result = nullptr;  // (B, S, N, D), contiguous
  bool has_norm = false, has_rope = false, pairs_halves = false;
  float eps = 0.0f;
  const float* weight = nullptr;  // (D,); null: ones
  int64_t rotary_dim = 0;         // R: the first elements of a head, those that rotate
  // Tables, or positions with the quarter turns (rotary.h) of one step. A batch stride is 0 where all rows share them.
  const float *sin = nullptr, *cos = nullptr;  // (1 or B, S, R / 2)
  const double* positions = nullptr;           // (1 or B, S); null: 0 .. S - 1
  int64_t row_stride = 0;                      // tokens from one batch row to the next, in tables or positions
  const double* quarter_turns = nullptr;       // (R / 2,)

  int64_t tokens() const { return batch * length; }
};

/// The kernels of one instruction set, for one storage type.
struct NormRopeKernels {
  void (*forward)(const NormRopeProblem&, int64_t first_token, int64_t last_token);
  /// Adds the range's share of the weight's gradient to weight_gradient (D,), where there is a weight.
  void (*backward)(const NormRopeProblem&, int64_t first_token, int64_t last_token, float* weight_gradient);
};

}  // namespace selfattn::cpu
