// kv_cache_positions and positions_of_append: which slot of its row each token has, and how many are then in use.
//
// Without ids a batch row is a row of the cache, and everything follows from its length. With ids a thread block takes
// a row of the cache, and looks for its tokens among all:
//
//     stretch of a warp | stretch | ...      each counts the row's tokens in its own
//        | thread block                      the counts of the stretches ahead: where its own begin
//     stretch of a warp | stretch | ...      each ranks them, and writes their slots
//
// The tokens of no row are written, and ids checked, by whichever thread comes to them.
#pragma once
// The range checks are part of the operator, not a debugging aid.
#undef NDEBUG
#include <cassert>

#include "flash/tile/constants.h"
#include "positions_params.h"

namespace selfattn::cuda {

constexpr int kPositionThreads = 256;  // of a thread block, without ids
// With ids a thread block has a warp for each kStretchTokens tokens, but no more than so many warps.
constexpr int kStretchTokens = 256, kMostStretches = 32;
constexpr unsigned kWholeWarp = ~0u;

// A token's place in the tensors of the call.
struct TokenPlace {
  int batch, column;

  __device__ __forceinline__ TokenPlace(const PositionsParams& p, int token)
      : batch(token / p.by_columns), column(token - batch * p.columns) {}
  __device__ __forceinline__ int64_t of(const IntegerView& integers) const { return integers.at(batch, column); }
};

// Of a call with ids, negative for a token of no row.
__device__ __forceinline__ int64_t checked_row(const PositionsParams& p, const TokenPlace& place) {
  const int64_t row = place.of(p.segment_ids);
  assert(row < p.rows && "segment_ids must hold rows of the cache, below the number of lengths, or negative values");
  return row;
}

__device__ __forceinline__ int64_t checked_position(const PositionsParams& p, const TokenPlace& place) {
  const int64_t position = place.of(p.given);
  assert(position == static_cast<int>(position) && "positions must hold values that fit in int32");
  return position;
}

// Slots of a row in use after a call with so many tokens of it.
__device__ __forceinline__ int64_t checked_length(const PositionsParams& p, int row, int tokens) {
  const int64_t length = p.lengths.at(row, 0), added = p.lengths_after ? tokens : 0;
  assert(length >= -added && length <= p.capacity - added &&
         "lengths must hold values from 0 to the slots of a row of the cache");
  return length + added;
}

__device__ __forceinline__ void store_length(const PositionsParams& p, int row, int64_t length) {
  if (!p.lengths_after) return;
  if (p.lengths.is_int64)
    static_cast<int64_t*>(p.lengths_after)[row] = length;
  else
    static_cast<int*>(p.lengths_after)[row] = static_cast<int>(length);
}

// Without ids, or where nothing depends on the order of tokens: positions are given, and lengths count them already.
__global__ void __launch_bounds__(kPositionThreads)
    kv_cache_positions_kernel(const __grid_constant__ PositionsParams p) {
  const int thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
  for (int row = thread; row < p.rows; row += threads) store_length(p, row, checked_length(p, row, p.columns));
  for (int token = thread; token < p.tokens; token += threads) {
    const TokenPlace place(p, token);
    const bool has_row = !p.segment_ids || checked_row(p, place) >= 0;
    int64_t position;
    if (p.given)
      position = checked_position(p, place);
    else
      position = p.lengths.at(place.batch, 0) + place.column - (p.lengths_after ? 0 : p.columns);
    p.positions[token] = has_row ? position : -1;
  }
}

// By a whole warp: take(token, rank) of a row's tokens among those that stand begin-th to end-th, whose number it
// gives. They are counted from where the length of the row is known: from the first token on where it does not count
// them, else from the last one back.
template <class Take>
__device__ __forceinline__ int find_tokens(const PositionsParams& p, int row, int begin, int end, const Take& take) {
  constexpr int kAtOnce = 4;  // so many ids of a lane are on their way together
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  int count = 0;
  for (int first = begin; first < end; first += kAtOnce * kWarpSize) {
    int tokens[kAtOnce];
    bool is_own[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      const int index = first + i * kWarpSize + lane;
      tokens[i] = p.lengths_after ? index : p.tokens - 1 - index;
      is_own[i] = index < end && TokenPlace(p, tokens[i]).of(p.segment_ids) == row;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      const unsigned own = __ballot_sync(kWholeWarp, is_own[i]);
      if (is_own[i]) take(tokens[i], count + __popc(own & ((1u << lane) - 1)));
      count += __popc(own);
    }
  }
  return count;
}

// With ids.
__global__ void __launch_bounds__(kMostStretches* kWarpSize)
    ragged_kv_cache_positions_kernel(const __grid_constant__ PositionsParams p) {
  __shared__ int s_counts[kMostStretches];  // of the row's tokens in each stretch
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize;
  const int stretches = static_cast<int>(blockDim.x) / kWarpSize;

  const int threads = gridDim.x * blockDim.x;
  for (int token = blockIdx.x * blockDim.x + thread; token < p.tokens; token += threads) {
    const TokenPlace place(p, token);
    const bool has_row = checked_row(p, place) >= 0;
    const int64_t given = p.given ? checked_position(p, place) : 0;
    if (p.given || !has_row) p.positions[token] = has_row ? given : -1;
  }

  const int steps = (p.tokens + kWarpSize - 1) / kWarpSize, stretch = (steps + stretches - 1) / stretches * kWarpSize;
  const int begin = ::min(warp * stretch, p.tokens), end = ::min(begin + stretch, p.tokens);
  for (int row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const int own = find_tokens(p, row, begin, end, [](int, int) {});
    if (thread % kWarpSize == 0) s_counts[warp] = own;
    __syncthreads();  // all stretches are counted
    int before = 0, count = 0;
    for (int other = 0; other < stretches; other++) {
      before += other < warp ? s_counts[other] : 0;
      count += s_counts[other];
    }
    if (thread == 0) store_length(p, row, checked_length(p, row, count));
    if (own > 0 && !p.given) {
      const int64_t length = p.lengths.at(row, 0);
      find_tokens(p, row, begin, end, [&](int token, int rank) {
        p.positions[token] = p.lengths_after ? length + before + rank : length - 1 - before - rank;
      });
    }
    __syncthreads();  // the counts are read
  }
}

}  // namespace selfattn::cuda
