// qk_norm_rope_append and append_kv_cache, vector kernel: the forward kernel, but that keys leave to their slots of the
// cache, and a third kind of block copies the values there.
#pragma once
// The range checks are part of the operator, not a debugging aid.
#undef NDEBUG
#include <cassert>

#include "append_params.h"
#include "forward.cuh"

namespace selfattn::cuda {

// Where a token goes in the cache.
struct Slot {
  int64_t page;
  int token;
  bool is_written;
};

__device__ __forceinline__ Slot find_slot(const AppendParams& a, int batch, int token) {
  const int64_t row = a.segment_ids ? a.segment_ids.at(batch, token) : batch;
  if (row < 0) return {0, 0, false};
  assert(row < a.rows && "segment_ids must hold rows of the cache, or negative values");
  const int64_t position = a.positions.at(batch, token);
  assert(position >= 0 && position < int64_t(a.page_size) * a.pages_per_row &&
         "positions must hold slots of a row of the cache");
  const int column = static_cast<int>(position) / a.page_size;
  const int64_t page = a.page_table ? a.page_table.at(row, column) : row;
  assert(page >= 0 && page < a.pages && "page_table must hold pages of the cache where tokens are written");
  return {page, static_cast<int>(position) - column * a.page_size, true};
}

template <class Element>
__device__ __forceinline__ Element* place_of(const CacheView& cache, const Slot& slot) {
  return static_cast<Element*>(cache.data) + slot.page * cache.stride_page + slot.token * cache.stride_token;
}

template <class Element>
__device__ __forceinline__ void copy_values(const AppendParams& a, WarpTokens& tokens, int lane) {
  constexpr int kAtOnce = 4;
  const int chunks_of_head = a.dim_v / kChunk, chunks = tokens.side.heads * chunks_of_head;
  for (; tokens.find(); tokens.advance()) {
    const Slot slot = find_slot(a, tokens.batch, tokens.token);
    if (!slot.is_written) continue;
    const Element* const g_values = token_of<Element>(a.values, tokens.batch, tokens.token);
    Element* const g_slot = place_of<Element>(a.value_cache, slot);
    for (int first = lane; first < chunks; first += kAtOnce * kWarpSize) {
      Chunk<Element> values[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) {
        const int chunk = first + i * kWarpSize, head = chunk / chunks_of_head;
        values[i] = load_chunk(g_values + head * a.values.stride_head + (chunk - head * chunks_of_head) * kChunk,
                               chunk < chunks);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) {
        const int chunk = first + i * kWarpSize, head = chunk / chunks_of_head;
        if (chunk < chunks)
          store_chunk(g_slot + head * a.value_cache.stride_head + (chunk - head * chunks_of_head) * kChunk, values[i]);
      }
    }
  }
}

// blockIdx: the blocks of q, of k, and as many as of k for the values.
template <class Config>
__global__ void __launch_bounds__(kVectorThreads, Config::kMinBlocks)
    qk_norm_rope_append_kernel(const __grid_constant__ AppendParams a) {
  using Element = typename Config::Element;
  __shared__ __align__(16) float s_rotations[kVectorWarps][Config::kMaxDim];
  __shared__ __align__(16) SharedWeight<Config> s_weight;
  const NormRopeParams& p = a.norm_rope;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int query_blocks = p.sides[0].blocks, key_blocks = p.sides[1].blocks, block = blockIdx.x;
  const bool is_query = block < query_blocks, is_value = block >= query_blocks + key_blocks;
  const NormRopeSide& side = p.sides[is_query ? 0 : 1];
  WarpTokens tokens(p, side, is_query ? block : is_value ? block - query_blocks - key_blocks : block - query_blocks);
  if (is_value) return copy_values<Element>(a, tokens, lane);

  const LanePlace<Config> place(lane, p.dim);
  const LaneRotations<Config> source(p, side.angles, s_rotations[warp], lane);
  s_weight.fill(side, p.dim);
  __syncthreads();
  const float inverse_dim = 1.0f / static_cast<float>(p.dim);
  for (; tokens.find(); tokens.advance()) {
    Element* g_result = static_cast<Element*>(side.result) + static_cast<int64_t>(tokens.index) * side.heads * p.dim;
    int64_t stride_head = p.dim;
    if (!is_query) {
      const Slot slot = find_slot(a, tokens.batch, tokens.token);
      if (!slot.is_written) continue;
      g_result = place_of<Element>(a.key_cache, slot), stride_head = a.key_cache.stride_head;
    }
    normalise_and_rotate<Config>(p, side, place, source, s_weight, tokens, inverse_dim,
                                 [&](int head) { return g_result + head * stride_head; });
  }
}

}  // namespace selfattn::cuda
