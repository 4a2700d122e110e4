// The slices of a group's keys and values on their way into its ring, across the ends of pieces: while the warps end
// one piece, what the next ones want is being copied.
#pragma once
#include "config.h"
#include "ptx/async_copy.cuh"
#include "schedule.cuh"

namespace selfattn::cuda::kv_cache {

// Whether some row of the tile may see one of the keys.
inline __device__ __noinline__ bool is_wanted(const KernelParams& p, const Tile& tile, const Interval& keys) {
  for (int row = 0; row < tile.count; row++) {
    const VisibleKeys visible = visible_keys(p, tile, row);
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

  __device__ __forceinline__ Loader(const KernelParams& p, const Share& share)
      : p_(p), share_(share), walk_(p, share) {}

  // Starts the copies of the group's next slice; the share's last one may be behind it. Every call ends a group of
  // copies.
  __device__ __forceinline__ void load_next(uint32_t s_slot) {
    while (slice_ >= last_slice_ && has_piece_) begin_piece();
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
    Piece piece;
    has_piece_ = walk_.find_next(p_, share_, piece);
    if (!has_piece_) return;
    range_ = piece.keys, kv_head_ = piece.kv_head;
    slice_ = first_slice_of<Config>(range_, group());
    last_slice_ = (range_.end + Config::kSliceKeys - 1) / Config::kSliceKeys;
    first_of_pages_ = slice_ - kSlicesAhead * Config::kKeyGroups;
  }

  // Each lane looks up the page of one of the next sub-slices.
  __device__ __forceinline__ void find_pages() {
    const int slice = slice_ + lane() / Config::kSubSlices * Config::kKeyGroups;
    const int key = slice * Config::kSliceKeys + lane() % Config::kSubSlices * kPageMultiple;
    page_ = kNoPage, page_token_ = 0;
    first_of_pages_ = slice_;
    if (key >= range_.end || key + kPageMultiple <= range_.begin) return;
    const KvCacheParams& call = p_.call;
    const int column = key / p_.schedule.page_size, row = walk_.tile().entry.row;
    const int64_t page = call.page_table ? call.page_table.at(row, column) : row;
    page_token_ = key - column * call.page_size;
    if (page >= 0 && page < call.pages) {
      page_ = static_cast<int>(page);
    } else {
      const bool is_used = is_wanted(p_, walk_.tile(), range_ & Interval{key, key + kPageMultiple});
      assert(!is_used && "the page table must name pages of the cache");
    }
  }

  __device__ __forceinline__ void load(uint32_t s_slot) {
    if (slice_ - first_of_pages_ >= kSlicesAhead * Config::kKeyGroups) find_pages();
    const int source_lane = (slice_ - first_of_pages_) / Config::kKeyGroups * Config::kSubSlices;
#pragma unroll
    for (int sub = 0; sub < Config::kSubSlices; sub++) {
      const int page = __shfl_sync(~0u, page_, source_lane + sub);
      const int page_token = __shfl_sync(~0u, page_token_, source_lane + sub);
      const int key = slice_ * Config::kSliceKeys + sub * kPageMultiple;
      // Rows of the sub-slice in the piece; none without a page.
      Interval rows{range_.begin - key, range_.end - key};
      if (page == kNoPage) rows.end = rows.begin;
      copy(s_slot, sub, p_.call.k, p_.call.dim_qk, page, page_token, rows);
      copy(s_slot + Operand::kBytes, sub, p_.call.v, p_.call.dim_v, page, page_token, rows);
    }
  }

  __device__ __forceinline__ void copy(uint32_t s_operand, int sub, const TensorView& cache, int dim, int page,
                                       int page_token, const Interval& rows) const {
    const int first_row = thread() / kLanesOfRow, chunk = thread() % kLanesOfRow;
    const bool is_inside = chunk * sm80::kChunkElements < dim;
    const auto* g_chunk = static_cast<const uint16_t*>(cache.data);
    if (is_inside && page != kNoPage) {
      g_chunk += page * cache.stride_batch + (page_token + first_row) * cache.stride_token +
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
  const KernelParams& p_;
  const Share& share_;
  Walk walk_;
  Interval range_{0, 0};
  int kv_head_ = 0, slice_ = 0, last_slice_ = 0;
  int page_ = kNoPage, page_token_ = 0, first_of_pages_ = 0;  // of this lane's sub-slice, behind the first of pages
  bool has_piece_ = true;
};

}  // namespace selfattn::cuda::kv_cache
