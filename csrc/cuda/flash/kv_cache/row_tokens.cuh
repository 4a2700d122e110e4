// The tokens of a call with ids, by the row of the cache that each belongs to. By one thread block.
#pragma once
// The range checks of ids are part of the operator, not a debugging aid.
#undef NDEBUG
#include <cassert>

#include "divisor.h"
#include "flash/tile/constants.h"
#include "integer_view.h"

namespace selfattn::cuda::kv_cache {

constexpr int kPrepareThreads = 1024, kPrepareWarps = kPrepareThreads / kWarpSize;

// By the whole thread block: the sum of the values of the threads before this one, and `total` grows by that of all.
inline __device__ int sum_before(int value, int& total, int* s_sums) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  int up_to = value;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int before = __shfl_up_sync(~0u, up_to, distance);
    if (lane >= distance) up_to += before;
  }
  if (lane == kWarpSize - 1) s_sums[warp] = up_to;
  __syncthreads();
  int before = total;
  for (int other = 0; other < kPrepareWarps; other++) {
    if (other < warp) before += s_sums[other];
    total += s_sums[other];
  }
  __syncthreads();
  return before + up_to - value;
}

// Of a call's tokens, (batch, queries) in their order, those of row r of the cache are order[start] ..
// order[start + count - 1], in the call's order. The tokens of no row (negative ids) make up one more, row `rows`.
struct RowTokens {
  IntegerView ids;  // (batch, queries)
  Divisor queries;
  int tokens, rows;

  // Written here.
  int* order;            // (tokens)
  int *counts, *starts;  // (rows + 1); starts: lost at the end

  __device__ __forceinline__ int row_of(int token) const {
    const int batch = token / queries;
    const int64_t id = ids.at(batch, token - batch * queries.value);
    assert(id < rows && "segment ids must name rows of the cache");
    return id < 0 ? rows : static_cast<int>(id);
  }

  // visit(row, start, count): by all threads at once, each for a row of its own; a row past `rows` has no tokens.
  template <class Visit>
  __device__ __forceinline__ void sort(int* s_sums, const Visit& visit) const {
    const int thread = static_cast<int>(threadIdx.x);
    for (int row = thread; row <= rows; row += kPrepareThreads) counts[row] = 0;
    __syncthreads();
    for (int token = thread; token < tokens; token += kPrepareThreads) atomicAdd(counts + row_of(token), 1);
    __syncthreads();
    int tokens_before = 0;
    for (int first = 0; first <= rows; first += kPrepareThreads) {
      const int row = first + thread, count = row <= rows ? counts[row] : 0;
      const int start = sum_before(count, tokens_before, s_sums);
      if (row <= rows) starts[row] = start;
      visit(row, start, count);
    }
    __syncthreads();
    // Warp after warp, so that tokens stay in order. starts: of the tokens yet to come.
    for (int first = 0; first < tokens; first += kPrepareThreads) {
      const int token = first + thread;
      const int row = token < tokens ? row_of(token) : -1;
      for (int warp = 0; warp < kPrepareWarps && first + warp * kWarpSize < tokens; warp++) {
        if (thread / kWarpSize == warp) {
          const unsigned same = __match_any_sync(~0u, row);
          const int rank = __popc(same & ((1u << thread % kWarpSize) - 1));
          const int start = row >= 0 ? starts[row] : 0;
          __syncwarp();
          if (row >= 0) {
            order[start + rank] = token;
            if (rank == 0) starts[row] = start + __popc(same);
          }
        }
        __syncthreads();
      }
    }
  }
};

}  // namespace selfattn::cuda::kv_cache
