// The producer warp where keys and values lie in pages (ForwardParams::pages). A key block comes in boxes, of one page
// each: every lane looks up the page of its own, a block ahead of its copy, and the first lane issues them all. Lanes
// that issue their own do so in turn, which takes longer.
//
// The warp has few registers. What it knows from one block to the next lies in shared memory.
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
  __device__ __forceinline__ void keep(int turn, int block, int page) const {
    if (!is_in_block()) return;
    const int key = block * Config::kTileKey + first_row_;
    s_.boxes[turn][box()] = {page, key % p_.pages.size, s_.paged.kv_head};
  }

  // By all lanes, of which the first has announced the bytes of the whole block. `map`: of p.key or p.value.
  template <int kPanels>
  __device__ __forceinline__ void copy(const CUtensorMap& map, uint64_t& barrier, const unsigned char* s_block,
                                       int turn) const {
    __syncwarp();  // all pages are kept
    if (box() == 0) {
      const uint32_t s_rows = ptx::shared_address(s_block);
#pragma unroll 1
      for (int i = 0, row = 0; row < Config::kTileKey; i++, row += p_.box_rows) {
        const PageBox kept = s_.boxes[turn][i];
        for (int panel = 0; panel < kPanels; panel++)
          ptx::tma_load_4d(&map, barrier, s_rows + row * kPanelRowBytes + panel * Config::kKeyPanelBytes,
                           panel * kPanelColumns, kept.first_slot, kept.kv_head, kept.page);
      }
    }
    __syncwarp();  // before the next pages take their place
  }

 private:
  __device__ __forceinline__ bool is_in_block() const { return first_row_ < Config::kTileKey; }
  static __device__ __forceinline__ int box() { return static_cast<int>(threadIdx.x) % kWarpSize; }

  const ForwardKernelParams& p_;
  typename Config::SharedStorage& s_;
  int first_row_;  // of the lane's box, in a key block
};

// As load_tiles. The keys of a query are an interval (SegmentProblem::cache), so that no block in reach is left out.
template <class Config, bool kIsRepair>
__device__ __forceinline__ void load_tiles_from_pages(const ForwardKernelParams& p, typename Config::SharedStorage& s) {
  const bool is_first_lane = threadIdx.x % kWarpSize == 0;
  const PageBoxes<Config> boxes(p, s);
  Ring<Config::kQueryStages> q;
  Ring<Config::kKeyStages> k;
  Ring<Config::kValueStages> v;
  int turn = 0;  // of the boxes of the block in work

  // V lags one block behind K, across tiles too: the order of use.
  const auto load_value = [&](int turn) {
    if (is_first_lane) {
      ptx::mbarrier_wait(s.v_empty[v.stage], v.parity ^ 1);
      ptx::mbarrier_arrive_expect(s.v_full[v.stage], Config::kValueBytes);
    }
    boxes.template copy<Config::kPanelsV>(p.value, s.v_full[v.stage], s.v[v.stage], turn);
    v.advance();
  };
  int number = blockIdx.x;
  if (kIsRepair) number = __shfl_sync(~0u, is_first_lane ? take_tile<Config, kIsRepair>(p, s) : 0, 0);
  ptx::wait_for_previous_kernel();
  // Loads the tiles in the order of use: K_n, (Q), V_{n+1}, ...
  bool has_value = false;
  while (number < p.schedule.tiles) {
    const Interval keys = describe_tile<Config, kIsRepair>(p, number, s.upcoming);
    const int heads = p.shape.num_heads, batch = s.upcoming.head / heads, head = s.upcoming.head - batch * heads;
    s.paged = {keys, batch, head, head / (heads / p.shape.num_kv_heads)};
    __syncwarp();
    int index = s.upcoming.end_block - 1;
    boxes.keep(turn, index, boxes.find_page(index));
#pragma unroll 1
    for (bool is_first = true;; is_first = false) {
      const bool is_last = index == s.upcoming.first_block;
      const int next_page = is_last ? 0 : boxes.find_page(index - 1);
      if (is_first_lane) {
        if (is_last) number = take_tile<Config, kIsRepair>(p, s);
        ptx::mbarrier_wait(s.k_empty[k.stage], k.parity ^ 1);
        s.block_message[k.stage] = KeyBlock{index, is_last, false}.encode();
        ptx::mbarrier_arrive_expect(s.k_full[k.stage], Config::kKeyBytes);
      }
      boxes.template copy<Config::kPanelsQk>(p.key, s.k_full[k.stage], s.k[k.stage], turn);
      k.advance(), turn ^= 1;
      if (has_value) load_value(turn);
      has_value = true;
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
      boxes.keep(turn, index, next_page);
    }
    number = __shfl_sync(~0u, number, 0);
  }
  if (has_value) load_value(turn ^ 1);
  if (is_first_lane) announce_end<Config>(s, q);
}

}  // namespace selfattn::cuda::sm90
