// Tensor maps for TMA, encoded on the host without linking libcuda.
#pragma once
#include <cuda.h>

#include "flash/params.h"

namespace selfattn::cuda {

// Elements in a row of a shared-memory panel: 128 bytes, the span of the swizzle.
constexpr int kPanelColumns = 64;

// A (batch, length, heads, dim) tensor as {dim, length, heads, batch}; a box is one panel: kPanelColumns x rows of one
// head. Loads fill what lies outside with zeros, stores leave it alone, so no kernel has code for tails of dim or
// length. `promotion`: how much the memory gives to L2 where TMA asks for less; more than one panel's row reads ahead
// where a row is longer. Throws std::runtime_error if the driver refuses.
CUtensorMap make_tensor_map(const TensorView& view, ElementType element, int batch, int length, int heads, int dim,
                            int rows, CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B);

}  // namespace selfattn::cuda
