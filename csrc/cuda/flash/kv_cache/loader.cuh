// The slices of a group's keys and values on their way into its ring, across the ends of pieces: while the warps end
// one piece, what the next ones want is being copied.
#pragma once
#include "config.h"
#include "ptx/async_copy.cuh"
#include "ptx/register.cuh"
#include "schedule.cuh"

namespace selfattn::cuda::kv_cache {

// Whether some row of the tile may see one of the keys.
inline __device__ __noinline__ bool is_wanted(const KernelParams& p, const Tile& tile, const Interval& keys) {
#pragma unroll 1
  for (int row = 0; row < tile.count; row++) {
    const VisibleKeys visible = visible_keys(p, tile, row);
#pragma unroll 1
    for (int key = keys.begin; key < keys.end; key++)
      if (visible.has(key)) return true;
  }
  return false;
}

// The first slice of an interval of keys that a group has.
template <class Config>
__device__ __forceinline__ int first_slice_of(const Interval& keys, int group) {
  const int first = keys.begin / Config::kSliceKeys;
  return first + (group + Config::kKeyGroups - first % Config::kKeyGroups) % Config::kKeyGroups;
}

template <class Config>
class Loader {
 public:
  using Operand = typename Config::Operand;

  // s_walk is at the first piece, where there is one.
  // s_p: the same as p, in shared memory.
  __device__ __forceinline__ Loader(const KernelParams& p, const KernelParams& s_p, const Share& s_share, Walk& s_walk,
                                    bool has_piece)
      : p_(p), s_p_(s_p), s_share_(s_share), s_walk_(s_walk), has_piece_(has_piece) {
    if (has_piece) begin_piece();
  }

  // Starts the copies of the group's next slice; the share's last one may be behind it. Every call ends a group of
  // copies.
  __device__ __forceinline__ void load_next(uint32_t s_slot) {
    while (slice_ >= last_slice_ && has_piece_) {
      has_piece_ = find_next(s_p_, s_share_, s_walk_);
      if (has_piece_) begin_piece();
    }
    if (has_piece_) {
      load(s_slot);
      slice_ += Config::kKeyGroups;
    }
    ptx::commit_copies();
  }

 private:
  static constexpr int kLanesOfRow = Config::kDim / sm80::kChunkElements;
  static constexpr int kRowStep = Config::kGroupThreads / kLanesOfRow, kCopies = kPageMultiple / kRowStep;
  static constexpr int kSlicesAhead = kWarpSize / Config::kSubSlices;  // whose pages a warp's lanes hold

  static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x) % Config::kGroupThreads; }
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }
  static __device__ __forceinline__ int group() { return static_cast<int>(threadIdx.x) / Config::kGroupThreads; }

  __device__ __forceinline__ void begin_piece() {
    keys_ = s_walk_.piece.keys, kv_head_ = s_walk_.piece.kv_head;
    slice_ = first_slice_of<Config>(keys_, group());
    last_slice_ = (keys_.end + Config::kSliceKeys - 1) / Config::kSliceKeys;
    first_of_pages_ = slice_ - kSlicesAhead * Config::kKeyGroups;
  }

  // Each lane looks up the page of one of the next sub-slices.
  __device__ __forceinline__ void find_pages() {
    const int slice = slice_ + lane() / Config::kSubSlices * Config::kKeyGroups;
    const int key = slice * Config::kSliceKeys + lane() % Config::kSubSlices * kPageMultiple;
    page_ = kNoPage, page_token_ = 0;
    first_of_pages_ = slice_;
    if (key >= keys_.end || key + kPageMultiple <= keys_.begin) return;
    const KvCacheParams& call = s_p_.call;
    const int column = key / s_p_.schedule.page_size, row = s_walk_.tile.entry.row;
    const int64_t page = call.page_table ? call.page_table.at(row, column) : row;
    page_token_ = key - column * call.page_size;
    if (page >= 0 && page < call.pages) {
      page_ = static_cast<int>(page);
    } else {
      const bool is_used = is_wanted(s_p_, s_walk_.tile, keys_ & Interval{key, key + kPageMultiple});
      assert(!is_used && "the page table must name pages of the cache");
    }
  }

  // A loop over sub-slices, keys and values: what a warp meets first comes from cold memory, and less code sooner.
  __device__ __forceinline__ void load(uint32_t s_slot) {
    if (slice_ - first_of_pages_ >= kSlicesAhead * Config::kKeyGroups) find_pages();
    const int source_lane = (slice_ - first_of_pages_) / Config::kKeyGroups * Config::kSubSlices;
#pragma unroll 1
    for (int i = 0; i < 2 * Config::kSubSlices; i++) {
      const int sub = i / 2, which = i % 2;
      const int page = __shfl_sync(~0u, page_, source_lane + sub);
      const int page_token = __shfl_sync(~0u, page_token_, source_lane + sub);
      const int key = slice_ * Config::kSliceKeys + sub * kPageMultiple;
      // Rows of the sub-slice in the piece; none without a page.
      Interval rows{keys_.begin - key, keys_.end - key};
      if (page == kNoPage) rows.end = rows.begin;
      copy(s_slot + which * Operand::kBytes, sub, p_.caches[which], page, page_token, rows);
    }
  }

  __device__ __forceinline__ void copy(uint32_t s_operand, int sub, const CacheSource& cache, int page, int page_token,
                                       const Interval& rows) const {
    const int place = ptx::forget(thread()), first_row = place / kLanesOfRow, chunk = place % kLanesOfRow;
    const bool is_inside = chunk * sm80::kChunkElements < cache.dim;
    const uint16_t* g_chunk = cache.data;
    if (is_inside && page != kNoPage) {
      g_chunk += page * cache.stride_page + (page_token + first_row) * cache.stride_token +
                 kv_head_ * cache.stride_head + chunk * sm80::kChunkElements;
    }
    const int64_t step = kRowStep * cache.stride_token;
    // Of its rows the thread copies those that are neither before the piece nor behind it.
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

  static constexpr int kNoPage = -1;
  const KernelParams &p_, &s_p_;
  const Share& s_share_;
  Walk& s_walk_;
  Interval keys_{0, 0};
  int kv_head_ = 0, slice_ = 0, last_slice_ = 0;
  int page_ = kNoPage, page_token_ = 0, first_of_pages_ = 0;  // of this lane's sub-slice, behind the first of pages
  bool has_piece_;
};

}  // namespace selfattn::cuda::kv_cache
