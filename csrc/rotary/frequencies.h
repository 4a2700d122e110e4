#pragma once

#include <selfattn/rope.h>

namespace selfattn {

/// Throws c10::ValueError where a field is bad, missing, or not used by the type; the message names it.
void check(const RopeParameters& parameters);

/// Whether the frequencies change with the length: "dynamic" and "longrope".
bool depends_on_length(const RopeParameters& parameters);

/// The angle of one token's step for each of the R / 2 pairs, in radians, of checked parameters. `length`: the largest
/// position plus 1; only types that depend on it read it.
std::vector<double> inverse_frequencies(const RopeParameters& parameters, int64_t length);

/// What sines and cosines are multiplied by.
double attention_factor(const RopeParameters& parameters);

}  // namespace selfattn
