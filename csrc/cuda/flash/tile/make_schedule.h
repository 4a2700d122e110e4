// The order of query tiles (tile_order.cuh) for a call.
#pragma once
#include <algorithm>

#include "flash/params.h"
#include "flash/tile/tile_order.cuh"

namespace selfattn::cuda {

// Keys and values of the heads worked on together, in bytes: few, so that they stay in L2 and memory is read evenly.
// With a mask the tiles differ, and at the end those of several heads are wanted to even out the thread blocks:
// last_section_bytes.
constexpr int64_t kSectionBytes = 8 << 20;

inline TileSchedule make_schedule(const AttentionShape& shape, int tile_query, bool is_masked,
                                  int64_t last_section_bytes, int element_bytes = 2) {
  const int group = shape.num_heads / shape.num_kv_heads;
  const int64_t bytes_per_group = int64_t(shape.key_length) * (shape.dim_qk + shape.dim_v) * element_bytes;
  TileSchedule schedule;
  schedule.heads = shape.batch * shape.num_heads;
  schedule.tiles_per_head = (shape.query_length + tile_query - 1) / tile_query;
  schedule.tiles = schedule.heads * schedule.tiles_per_head;
  const auto heads_in = [&](int64_t bytes) {
    const int64_t groups = std::max<int64_t>(bytes / bytes_per_group, 1);
    return static_cast<int>(std::min<int64_t>(groups * group, schedule.heads));
  };
  schedule.section = heads_in(kSectionBytes);
  const int wanted = is_masked ? heads_in(last_section_bytes) : schedule.section;
  schedule.last_section = schedule.heads - (schedule.heads - wanted) / schedule.section * schedule.section;
  return schedule;
}

}  // namespace selfattn::cuda
