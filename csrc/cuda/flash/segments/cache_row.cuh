// A batch row of queries over a KV cache: what each may see follows from the row's length.
#pragma once
#include <cassert>
#include <cstdint>

#include "flash/tile/window.h"
#include "row_ids.cuh"

namespace selfattn::cuda {

struct CacheRow {
  static constexpr bool kMayBeGeneral = false;
  static constexpr int kSides = 1;  // queries

  const SegmentProblem& p;
  int64_t b;
  int slots;  // in use
  CacheTile tile;

  __device__ CacheRow(const SegmentProblem& p, int64_t b, unsigned*, int, int) : p(p), b(b) {
    tile = p.cache.tiles ? p.cache.tiles[b] : CacheTile{static_cast<int>(b), 0, p.query_length};
    const int64_t found = tile.count ? p.cache.lengths.at(tile.row, 0) : 0;
    assert(found >= 0 && found <= p.key_length && "lengths must fit the cache");
    slots = static_cast<int>(found);
    if (!p.cache.tiles) tile.first_position = slots - p.query_length;
  }

  __device__ __forceinline__ int length(int side) const { return side == kQuerySide ? p.query_length : p.key_length; }

  // Called by the thread blocks of the row, each for a share of the pages, to see that those in reach are there. What
  // one query sees meets what the next one sees.
  __device__ __forceinline__ bool find_intervals() const {
    if (!p.cache.page_table || tile.count == 0) return true;
    const Interval reach{interval(kQuerySide, 0).begin, interval(kQuerySide, tile.count - 1).end};
    const int first = blockIdx.y * blockDim.x + threadIdx.x, step = gridDim.y * blockDim.x;
    const int end = (reach.end + p.cache.page_size - 1) / p.cache.page_size;
#pragma unroll 1
    for (int page = reach.begin / p.cache.page_size + first; page < end; page += step) {
      const int64_t entry = p.cache.page_table.at(b, page);
      assert(entry >= 0 && entry < p.cache.pages && "the page table must name pages of the cache");
    }
    return true;
  }

  __device__ __forceinline__ Interval interval(int, int query) const {
    const AttentionWindow window{p.cache.window_left, p.cache.window_right};
    if (query < tile.count) return slots_of_query(window, tile.first_position + query, slots);
    // Nothing, behind what the last query sees.
    const int end = tile.count ? slots_of_query(window, tile.first_position + tile.count - 1, slots).end : 0;
    return {end, end};
  }
};

}  // namespace selfattn::cuda
