// The slices of keys and values on their way into the ring of a chunk's warps, across the ends of pieces: while these
// end one piece, what the next ones want is being copied.
#pragma once
#include "config.h"
#include "ptx/async_copy.cuh"
#include "schedule.cuh"
#include "sub_slice.cuh"

namespace selfattn::cuda::kv_cache {

template <class Config>
class ChunkLoader {
 public:
  // s_walk is at the first piece, where there is one.
  // s_p: the same as p, in shared memory.
  __device__ __forceinline__ ChunkLoader(const KernelParams& p, const KernelParams& s_p, const Share& s_share,
                                         Walk& s_walk, bool has_piece)
      : p_(p), s_p_(s_p), s_share_(s_share), s_walk_(s_walk), has_piece_(has_piece) {
    if (has_piece) begin_piece();
  }

  // Starts the copies of the next slice; the share's last one may be behind it. Every call ends a group of
  // copies.
  __device__ __forceinline__ void load_next(uint32_t s_slot) {
    while (slice_ >= last_slice_ && has_piece_) {
      has_piece_ = find_next(s_p_, s_share_, s_walk_);
      if (has_piece_) begin_piece();
    }
    if (has_piece_) {
      load(s_slot);
      slice_++;
    }
    ptx::commit_copies();
  }

 private:
  static constexpr int kSlicesAhead = kWarpSize / Config::kSubSlices;  // whose pages a warp's lanes hold

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }

  __device__ __forceinline__ void begin_piece() {
    keys_ = s_walk_.piece.keys, kv_head_ = s_walk_.piece.kv_head;
    slice_ = keys_.begin / Config::kSliceKeys;
    last_slice_ = (keys_.end + Config::kSliceKeys - 1) / Config::kSliceKeys;
    first_of_pages_ = slice_ - kSlicesAhead;
  }

  // Each lane looks up the page of one of the next sub-slices.
  __device__ __forceinline__ void find_pages() {
    const int slice = slice_ + lane() / Config::kSubSlices;
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

  __device__ __forceinline__ void load(uint32_t s_slot) {
    if (slice_ - first_of_pages_ >= kSlicesAhead) find_pages();
    copy_slice<Config>(p_.caches, s_slot, keys_, kv_head_, slice_, page_, page_token_,
                       (slice_ - first_of_pages_) * Config::kSubSlices, kNoPage);
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
