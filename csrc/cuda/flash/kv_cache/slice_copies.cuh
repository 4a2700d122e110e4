// The slices of one group of warps on their way into its ring, started by a warp of their own: by TMA, and by cp.async
// on cards before Hopper.
//
// A warp that starts copies of its lanes (cp.async) waits until the memory takes them. Where it also attends, it does
// neither for long: on an H200 one SM then takes 42 GB/s, with warps of their own 67 and more.
#pragma once
#include <cuda.h>

#include "config.h"
#include "ptx/async_copy.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "schedule.cuh"
#include "sub_slice.cuh"

namespace selfattn::cuda::kv_cache {

// {dim, token, kv head, page}, boxes of one panel (flash/sm80/operand.cuh) and some sub-slices. A step of 0: all pages
// or heads are one in memory, and in the map.
struct CacheMap {
  CUtensorMap map;
  int page_step, head_step;
};

struct CacheMaps {
  CacheMap of[2];  // keys, values
  int sub_slices;
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kHasTma = true;
#else
constexpr bool kHasTma = false;
#endif

// A slot of a ring, and which time it is.
struct Slot {
  int stage = 0;
  unsigned parity = 0;

  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// The ring of a group in shared memory.
template <class Config>
struct Ring {
  unsigned char* slots;
  uint64_t *filled, *read;  // barriers, one a slot

  static constexpr int kFillers = kHasTma ? 1 : kWarpSize;  // arrivals at `filled`

  __device__ __forceinline__ unsigned char* slot(int stage) const { return slots + stage * Config::kSlotBytes; }
};

template <class Config>
class SliceCopies {
 public:
  // p: in shared memory. maps: parameters of the kernel.
  __device__ __forceinline__ SliceCopies(const KernelParams& p, const CacheMaps& maps, const Ring<Config>& ring,
                                         int step)
      : p_(p), maps_(maps), ring_(ring), step_(step) {}

  // From here on: some keys of a kv head, every step-th slice from a first one on.
  __device__ __forceinline__ void begin(const Interval& keys, int kv_head, int first_slice) {
    keys_ = keys, kv_head_ = kv_head, slice_ = first_slice;
    page_lane_ = kWarpSize;
  }
  // Of the keys there are these alone, as it turns out.
  __device__ __forceinline__ void cut(const Interval& keys) { keys_ = keys; }

  __device__ __forceinline__ bool has_next() const { return slice_ * Config::kSliceKeys < keys_.end; }

  // Each lane looks up the page of one of the next sub-slices. s_tile: whose keys they are. What the table says of keys
  // that there are not does not matter.
  __device__ __forceinline__ int64_t look_up_page(const Tile& s_tile) const {
    const KvCacheParams& call = p_.call;
    const int column = key_of_lane() / p_.schedule.page_size, row = s_tile.entry.row;
    return call.page_table && column < call.pages_per_row ? call.page_table.at(row, column) : row;
  }
  __device__ __forceinline__ void take_page(const Tile& s_tile, int64_t page) {
    const KvCacheParams& call = p_.call;
    const int key = key_of_lane(), end = key + (kHasTma ? maps_.sub_slices : 1) * kPageMultiple;
    page_ = call.pages;  // past the last one: nothing that anybody sees
    page_token_ = key - key / p_.schedule.page_size * call.page_size;
    page_lane_ = 0;
    if (key >= keys_.end || end <= keys_.begin) return;
    if (page >= 0 && page < call.pages) {
      page_ = static_cast<int>(page);
    } else {
      const bool is_used = is_wanted(p_, s_tile, keys_ & Interval{key, end});
      assert(!is_used && "the page table must name pages of the cache");
    }
  }

  // Starts the copies of the next slice, once its slot has been read; there is a next slice.
  __device__ __forceinline__ void load_next(const Tile& s_tile) {
    if (page_lane_ == kWarpSize) take_page(s_tile, look_up_page(s_tile));
    uint64_t& filled = ring_.filled[slot_.stage];
    const uint32_t s_slot = ptx::shared_address(ring_.slot(slot_.stage));
    if constexpr (kHasTma) {
      start_boxes(s_slot, filled);
    } else {
      wait_until_read();
      copy_slice<Config>(p_.caches, s_slot, keys_, kv_head_, slice_, page_, page_token_, page_lane_, p_.call.pages);
      ptx::arrive_after_copies(filled);
    }
    slice_ += step_, page_lane_ += Config::kSubSlices;
    slot_.advance(p_.stages);
  }

 private:
  using Operand = typename Config::Operand;

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }
  __device__ __forceinline__ int key_of_lane() const {
    return (slice_ + lane() / Config::kSubSlices * step_) * Config::kSliceKeys +
           lane() % Config::kSubSlices * kPageMultiple;
  }
  // The first time round it is free (mbarrier_wait).
  __device__ __forceinline__ void wait_until_read() const {
    ptx::mbarrier_wait(ring_.read[slot_.stage], slot_.parity ^ 1);
  }

  // Keys that are not wanted come too: what lies there, where it lies in the same box.
  __device__ __forceinline__ void start_boxes(uint32_t s_slot, uint64_t& filled) const {
    int pages[Config::kSubSlices], tokens[Config::kSubSlices];
#pragma unroll
    for (int sub = 0; sub < Config::kSubSlices; sub++) {
      pages[sub] = __shfl_sync(~0u, page_, page_lane_ + sub);
      tokens[sub] = __shfl_sync(~0u, page_token_, page_lane_ + sub);
    }
    // By one lane: where several do it the hardware takes them one after the other, three times as long each.
    if (lane() == 0) {
      wait_until_read();
      ptx::mbarrier_arrive_expect(filled, Config::kSlotBytes);
#pragma unroll
      for (int sub = 0; sub < Config::kSubSlices; sub++) {
        if (sub > 0 && maps_.sub_slices > 1) break;
        const uint32_t s_box = s_slot + sub * kPageMultiple * sm80::kPanelRowBytes;
#pragma unroll
        for (int which = 0; which < 2; which++)
#pragma unroll
          for (int panel = 0; panel < Operand::kPanels; panel++)
            ptx::tma_load_4d(&maps_.of[which].map, filled,
                             s_box + which * Operand::kBytes + panel * Operand::kPanelBytes,
                             panel * sm80::kPanelColumns, tokens[sub], kv_head_ * maps_.of[which].head_step,
                             pages[sub] * maps_.of[which].page_step);
      }
    }
    __syncwarp();
  }

  const KernelParams& p_;
  const CacheMaps& maps_;
  Ring<Config> ring_;
  int step_;
  Interval keys_;
  int kv_head_, slice_;
  Slot slot_;
  int page_ = 0, page_token_ = 0;  // of this lane's sub-slice
  int page_lane_ = kWarpSize;      // that has the next slice's first page
};

}  // namespace selfattn::cuda::kv_cache
