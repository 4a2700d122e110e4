// The producer warps where keys and values lie in pages (ForwardParams::pages): one for Q and K, one for V. A key block
// comes in boxes, of one page each: every lane of the first looks up the page of its own, a block ahead of its copy,
// and every lane of both issues it.
//
// The warps have few registers. What they know from one block to the next lies in shared memory, in a ring from the
// first to the second (boxes_full, boxes_empty).
#pragma once
#include "producer.cuh"

namespace selfattn::cuda::sm90 {

template <class Config>
class PageBoxes {
 public:
  __device__ __forceinline__ PageBoxes(const ForwardKernelParams& p, typename Config::SharedStorage& s)
      : p_(p), s_(s), first_row_(box() * p.box_rows) {}

  // The page of the lane's box in a block of the tile in work. Only one that holds a key in reach may be looked up;
  // past the last page TMA fills in zeros.
  __device__ __forceinline__ int find_page(int block) const {
    const int key = block * Config::kTileKey + first_row_;
    const bool is_in_reach = is_in_block() && key < s_.paged.keys.end && key + p_.box_rows > s_.paged.keys.begin;
    if (!is_in_reach) return p_.pages.count;
    return static_cast<int>(p_.pages.table.at(s_.paged.batch, key / p_.pages.size));
  }
  __device__ __forceinline__ void keep(int stage, int block, int page) const {
    if (!is_in_block()) return;
    const int key = block * Config::kTileKey + first_row_;
    s_.boxes[stage][box()] = {page, key % p_.pages.size, s_.paged.kv_head};
  }

  // By all lanes, behind the one that has announced the bytes of the whole block. `map`: of p.key or p.value.
  template <int kPanels>
  __device__ __forceinline__ void copy(const CUtensorMap& map, uint64_t& barrier, const unsigned char* s_block,
                                       int stage) const {
    __syncwarp();
    if (!is_in_block()) return;
    const PageBox& box_kept = s_.boxes[stage][box()];
    const uint32_t s_rows = ptx::shared_address(s_block) + first_row_ * kPanelRowBytes;
    for (int panel = 0; panel < kPanels; panel++)
      ptx::tma_load_4d(&map, barrier, s_rows + panel * Config::kKeyPanelBytes, panel * kPanelColumns,
                       box_kept.first_slot, box_kept.kv_head, box_kept.page);
  }

 private:
  __device__ __forceinline__ bool is_in_block() const { return first_row_ < Config::kTileKey; }
  static __device__ __forceinline__ int box() { return static_cast<int>(threadIdx.x) % kWarpSize; }

  const ForwardKernelParams& p_;
  typename Config::SharedStorage& s_;
  int first_row_;  // of the lane's box, in a key block
};

// In place of the boxes' kv head: behind the last tile.
constexpr int kNoMoreBoxes = -1;

// As load_tiles, but for V. The keys of a query are an interval (SegmentProblem::cache), so that no block in reach is
// left out.
template <class Config, bool kIsRepair>
__device__ __forceinline__ void load_tiles_from_pages(const ForwardKernelParams& p, typename Config::SharedStorage& s) {
  const bool is_first_lane = threadIdx.x % kWarpSize == 0;
  const PageBoxes<Config> boxes(p, s);
  Ring<Config::kQueryStages> q;
  Ring<Config::kKeyStages> k;
  Ring<Config::kBoxStages> box;
  int number = blockIdx.x;
  if (kIsRepair) number = __shfl_sync(~0u, is_first_lane ? take_tile<Config, kIsRepair>(p, s) : 0, 0);
  ptx::wait_for_previous_kernel();
  // Loads the tiles in the order of use: K_n, (Q), K_{n-1}, ...
  while (number < p.schedule.tiles) {
    const Interval keys = describe_tile<Config, kIsRepair>(p, number, s.upcoming);
    const int heads = p.shape.num_heads, batch = s.upcoming.head / heads, head = s.upcoming.head - batch * heads;
    s.paged = {keys, batch, head, head / (heads / p.shape.num_kv_heads)};
    __syncwarp();
    int index = s.upcoming.end_block - 1, page = boxes.find_page(index);
#pragma unroll 1
    for (bool is_first = true;; is_first = false) {
      const bool is_last = index == s.upcoming.first_block;
      ptx::mbarrier_wait(s.boxes_empty[box.stage], box.parity ^ 1);
      boxes.keep(box.stage, index, page);
      arrive_by_warp(s.boxes_full[box.stage], threadIdx.x % kWarpSize);
      if (!is_last) page = boxes.find_page(index - 1);
      if (is_first_lane) {
        if (is_last) number = take_tile<Config, kIsRepair>(p, s);
        ptx::mbarrier_wait(s.k_empty[k.stage], k.parity ^ 1);
        s.block_message[k.stage] = KeyBlock{index, is_last, false}.encode();
        ptx::mbarrier_arrive_expect(s.k_full[k.stage], Config::kKeyBytes);
      }
      boxes.template copy<Config::kPanelsQk>(p.key, s.k_full[k.stage], s.k[k.stage], box.stage);
      k.advance(), box.advance();
      if (is_first) {
        if (is_first_lane) {
          ptx::mbarrier_wait(s.q_empty[q.stage], q.parity ^ 1);
          const QueryTile& tile = s.upcoming;
          s.repair.take_stage(q.stage, tile.head * p.schedule.tiles_per_head + tile.index, p.repair_list);
          announce_query<Config>(p, s, q.stage, tile, s.paged.batch);
          copy_query<Config>(p, s, q.stage, tile.index, s.paged.batch, s.paged.query_head);
        }
        q.advance();
      }
      if (is_last) break;
      index--;
    }
    number = __shfl_sync(~0u, number, 0);
  }
  if (!is_first_lane) return;
  ptx::mbarrier_wait(s.boxes_empty[box.stage], box.parity ^ 1);
  s.boxes[box.stage][0].kv_head = kNoMoreBoxes;
  ptx::mbarrier_arrive(s.boxes_full[box.stage]);
  announce_end<Config>(s, q);
}

// The values of the same blocks, in the order of their keys: a warp of its own waits for no keys, and issues half the
// boxes.
template <class Config>
__device__ __forceinline__ void load_values_from_pages(const ForwardKernelParams& p,
                                                       typename Config::SharedStorage& s) {
  const int lane = threadIdx.x % kWarpSize;
  const PageBoxes<Config> boxes(p, s);
  Ring<Config::kValueStages> v;
  ptx::wait_for_previous_kernel();
  for (Ring<Config::kBoxStages> box;; box.advance(), v.advance()) {
    ptx::mbarrier_wait(s.boxes_full[box.stage], box.parity);
    if (s.boxes[box.stage][0].kv_head == kNoMoreBoxes) return;
    if (lane == 0) {
      ptx::mbarrier_wait(s.v_empty[v.stage], v.parity ^ 1);
      ptx::mbarrier_arrive_expect(s.v_full[v.stage], Config::kValueBytes);
    }
    boxes.template copy<Config::kPanelsV>(p.value, s.v_full[v.stage], s.v[v.stage], box.stage);
    arrive_by_warp(s.boxes_empty[box.stage], lane);
  }
}

}  // namespace selfattn::cuda::sm90
