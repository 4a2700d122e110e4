// Which keys a query may see, and the scores of the others set to -inf.
//
// Without ids a row's keys are an interval [begin, end). Within a warpgroup's 64 rows both limits never decrease, so
// the first and the last row tell which key blocks need no mask.
#pragma once
#include <cuda_runtime.h>

#include "online_softmax.cuh"
#include "window.h"

namespace selfattn::cuda {

// A lane holds, of each of its two rows, columns 8 * (k / 2) + k % 2 for k = 0, 1, ... from its first column on.
// The result has bit k set for those before column `end`, counted from the lane's first.
__device__ __forceinline__ uint32_t columns_before(int end) {
  const int count = end <= 0 ? 0 : end / 8 * 2 + ::min(end % 8, 2);
  return count >= 32 ? ~0u : (1u << count) - 1;
}

// kHasBegin false: every row's keys begin at 0.
template <bool kHasBegin, int kCount>
__device__ __forceinline__ void mask_by_intervals(float (&s)[kCount], const Interval (&rows)[2], int first_column) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    uint32_t allowed = columns_before(rows[r].end - first_column);
    if (kHasBegin) allowed &= ~columns_before(rows[r].begin - first_column);
#pragma unroll
    for (int k = 0; k < kCount / 2; k++)
      if (!(allowed >> k & 1)) s[k / 2 * 4 + 2 * r + k % 2] = -infinity();
  }
}

// row_id: of the lane's rows; column_ids: from its first column on.
template <int kCount>
__device__ __forceinline__ void mask_by_ids(float (&s)[kCount], const int (&row_id)[2], const int* column_ids) {
#pragma unroll
  for (int group = 0; group < kCount / 4; group++) {
    const int2 column_id = *reinterpret_cast<const int2*>(column_ids + 8 * group);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if (column_id.x != row_id[r]) s[4 * group + 2 * r] = -infinity();
      if (column_id.y != row_id[r]) s[4 * group + 2 * r + 1] = -infinity();
    }
  }
}

}  // namespace selfattn::cuda
