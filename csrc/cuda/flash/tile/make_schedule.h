// The order of tiles (tile_order.cuh) for a call.
#pragma once
#include <algorithm>

#include "flash/params.h"
#include "flash/tile/tile_order.cuh"

namespace selfattn::cuda {

// Sections of as many heads, whole groups of `group`, as together read `section_bytes`, and the last one
// `last_section_bytes`; a group reads bytes_of_group.
inline TileSchedule divide_into_sections(int heads, int group, int tiles_per_head, int64_t bytes_of_group,
                                         int64_t section_bytes, int64_t last_section_bytes) {
  const auto heads_in = [&](int64_t bytes) {
    const int64_t groups = std::max<int64_t>(bytes / bytes_of_group, 1);
    return static_cast<int>(std::min<int64_t>(groups * group, heads));
  };
  TileSchedule schedule;
  schedule.heads = heads;
  schedule.tiles_per_head = tiles_per_head;
  schedule.tiles = heads * tiles_per_head;
  schedule.section = heads_in(section_bytes);
  schedule.last_section = heads - (heads - heads_in(last_section_bytes)) / schedule.section * schedule.section;
  return schedule;
}

// Of query tiles, for the forward pass. Keys and values of the heads worked on together are few bytes, so that they
// stay in L2 and memory is read evenly. With a mask the tiles differ, and at the end those of several heads are wanted
// to even out the thread blocks: last_section_bytes.
inline TileSchedule make_schedule(const AttentionShape& shape, int tile_query, bool is_masked,
                                  int64_t last_section_bytes, int element_bytes = 2) {
  constexpr int64_t kSectionBytes = 8 << 20;
  const int64_t bytes_of_group = int64_t(shape.key_length) * (shape.dim_qk + shape.dim_v) * element_bytes;
  return divide_into_sections(shape.batch * shape.num_heads, shape.num_heads / shape.num_kv_heads,
                              (shape.query_length + tile_query - 1) / tile_query, bytes_of_group, kSectionBytes,
                              is_masked ? last_section_bytes : kSectionBytes);
}

}  // namespace selfattn::cuda
