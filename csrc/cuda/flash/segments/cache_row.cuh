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

  __device__ CacheRow(const SegmentProblem& p, int64_t b, unsigned*, int, int) : p(p), b(b) {
    const int64_t found = p.cache.lengths.at(b, 0);
    assert(found >= 0 && found <= p.key_length && "lengths must fit the cache");
    slots = static_cast<int>(found);
  }

  __device__ __forceinline__ int length(int side) const { return side == kQuerySide ? p.query_length : p.key_length; }

  // Called by the thread blocks of the row, each for a share of the pages, to see that those in reach are there. What
  // one query sees meets what the next one sees.
  __device__ __forceinline__ bool find_intervals() const {
    if (!p.cache.page_table) return true;
    const Interval reach{interval(kQuerySide, 0).begin, interval(kQuerySide, p.query_length - 1).end};
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
    return slots_of_query({p.cache.window_left, p.cache.window_right}, slots - p.query_length + query, slots);
  }
};

}  // namespace selfattn::cuda
