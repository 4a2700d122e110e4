// Copies of slices into shared memory by cp.async, kPageMultiple keys or values of a page at a time.
#pragma once
#include "config.h"
#include "ptx/async_copy.cuh"
#include "ptx/register.cuh"
#include "schedule.cuh"

namespace selfattn::cuda::kv_cache {

// By a group of warps, or one warp that stands for it. s_operand: of a slice, whose sub-slice it is. rows: of the
// sub-slice, those that are wanted; the others become zeros.
template <class Config>
__device__ __forceinline__ void copy_sub_slice(uint32_t s_operand, int sub, const CacheSource& cache, int kv_head,
                                               int page, int page_token, const Interval& rows) {
  using Operand = typename Config::Operand;
  constexpr int kLanesOfRow = Config::kDim / sm80::kChunkElements;
  constexpr int kRowStep = Config::kGroupThreads / kLanesOfRow, kCopies = kPageMultiple / kRowStep;
  const int place = ptx::forget(static_cast<int>(threadIdx.x) % Config::kGroupThreads);
  const int first_row = place / kLanesOfRow, chunk = place % kLanesOfRow;
  const bool is_inside = chunk * sm80::kChunkElements < cache.dim;
  const uint16_t* g_chunk = cache.data;
  if (is_inside && rows.begin < rows.end) {
    g_chunk += page * cache.stride_page + (page_token + first_row) * cache.stride_token + kv_head * cache.stride_head +
               chunk * sm80::kChunkElements;
  }
  const int64_t step = kRowStep * cache.stride_token;
  // Of its rows the thread copies those that are neither before the wanted ones nor behind them.
  const int before = rows.begin - first_row;
  const unsigned count = is_inside ? rows.end - rows.begin : 0;
  const uint32_t s_first = s_operand + Operand::place(sub * kPageMultiple + first_row, chunk);
#pragma unroll
  for (int i = 0; i < kCopies; i++, g_chunk += step) {
    const bool is_there = static_cast<unsigned>(i * kRowStep - before) < count;
    const uint32_t s_chunk = (s_first ^ i * kRowStep % 8 * sm80::kChunkBytes) + i * kRowStep * sm80::kPanelRowBytes;
    ptx::copy_async(s_chunk, g_chunk, is_there);
  }
}

// A slice of some keys, and their values, into a slot; zeros past the keys and where there is no page. page, token: of
// sub-slices, in lanes from first_lane on.
// A loop over sub-slices, keys and values: what a warp meets first comes from cold memory, and less code sooner.
template <class Config>
__device__ __forceinline__ void copy_slice(const CacheSource (&caches)[2], uint32_t s_slot, const Interval& keys,
                                           int kv_head, int slice, int page, int token, int first_lane, int no_page) {
#pragma unroll 1
  for (int i = 0; i < 2 * Config::kSubSlices; i++) {
    const int sub = i / 2, which = i % 2;
    const int page_of_sub = __shfl_sync(~0u, page, first_lane + sub);
    const int token_of_sub = __shfl_sync(~0u, token, first_lane + sub);
    const int key = slice * Config::kSliceKeys + sub * kPageMultiple;
    Interval rows{keys.begin - key, keys.end - key};
    if (page_of_sub == no_page) rows.end = rows.begin;
    copy_sub_slice<Config>(s_slot + which * Config::Operand::kBytes, sub, caches[which], kv_head, page_of_sub,
                           token_of_sub, rows);
  }
}

}  // namespace selfattn::cuda::kv_cache
