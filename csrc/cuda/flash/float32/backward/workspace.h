// The scratch memory of the float32 backward pass: two floats for each row of queries, filled up to whole tiles.
#pragma once
#include "config.h"

namespace selfattn::cuda::float32 {

// Rows of a head.
inline int stat_pitch(const AttentionShape& shape) {
  return (shape.query_length + kStatRows - 1) / kStatRows * kStatRows;
}

// Of one of the two arrays.
inline int64_t stat_count(const AttentionShape& shape) {
  return int64_t(shape.batch) * shape.num_heads * stat_pitch(shape);
}

}  // namespace selfattn::cuda::float32
