// The order in which the persistent thread blocks take the query tiles: sections of heads that are worked on together,
// so that their keys and values stay in L2; inside a section the tiles of rank 0 of all heads, then those of rank 1,
// and so on. The last section is larger and ranks its tiles by falling cost: short tiles of many heads are left to fill
// the end.
#pragma once
#include "flash/segments/tables.h"

namespace selfattn::cuda {

struct TileSchedule {
  int tiles;  // query tiles of all heads
  int tiles_per_head;
  int heads;         // batch * num_heads
  int section;       // heads worked on together
  int last_section;  // the same at the end; heads - last_section is a multiple of section
};

struct TilePlace {
  int head;  // batch * num_heads + query head
  int rank;  // inside the head
  bool is_last_section;
};

__device__ __forceinline__ TilePlace find_tile(const TileSchedule& schedule, int tile) {
  const int section_tiles = schedule.section * schedule.tiles_per_head;
  const int last_head = schedule.heads - schedule.last_section, last_tile = last_head * schedule.tiles_per_head;
  const bool is_last = tile >= last_tile;
  const int first_head = is_last ? last_head : tile / section_tiles * schedule.section;
  const int inside = is_last ? tile - last_tile : tile % section_tiles;
  const int heads = is_last ? schedule.last_section : schedule.section;
  return {first_head + inside % heads, inside / heads, is_last};
}

}  // namespace selfattn::cuda
