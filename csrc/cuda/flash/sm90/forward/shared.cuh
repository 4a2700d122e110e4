// What the roles of the forward kernel share: the kernel's parameters and the layout of shared memory.
#pragma once
#include "config.h"
#include "flash/sm90/repair_list.cuh"
#include "flash/tile/tile_order.cuh"
#include "ptx/mbarrier.cuh"

namespace selfattn::cuda::sm90 {

struct ForwardKernelParams {
  CUtensorMap query, key, value, out;  // boxes: query, out 64 rows; key, value a key block
  AttentionShape shape;
  AttentionWindow window;
  float scale;
  float* lse;          // (batch, num_heads, query_length)
  const float* sinks;  // (num_heads,) or null
  SegmentTables segments;
  int* repair_list;  // (tiles) for RepairList
  int* counters;     // [0]: tiles taken after each thread block's first; null where there are no others
  TileSchedule schedule;
};

// Beside the values of SegmentMode: the keys of a tile are limited by the window alone.
constexpr int kNoSegments = -1;

// What the producer warp tells the others about a tile; index -1 ends the work.
struct QueryTile {
  int index, head;
  int first_block, end_block;
  int mode;  // SegmentMode or kNoSegments
};

template <class Config>
struct ForwardShared {
  unsigned char* memory;
  uint32_t address;
  ForwardBarriers<Config> barriers;

  __device__ explicit ForwardShared(unsigned char* s)
      : memory(s), address(ptx::shared_address(s)), barriers{address + Config::kBarrierOffset} {}
  __device__ uint32_t query(int stage, int warpgroup) const {
    return address + stage * Config::kQueryBytes + warpgroup * Config::kQueryWarpgroupBytes;
  }
  __device__ uint32_t key(int stage) const { return address + Config::kKeyOffset + stage * Config::kKeyBytes; }
  __device__ uint32_t value(int stage) const { return address + Config::kValueOffset + stage * Config::kValueBytes; }
  // One int a query row: 0: first key of its run, or its id; 1: end of its run.
  __device__ int* row_table(int stage, int which) const {
    return reinterpret_cast<int*>(memory + Config::kRowTableOffset + (2 * stage + which) * Config::kRowTableBytes);
  }
  __device__ QueryTile& tile(int stage) const {
    return reinterpret_cast<QueryTile*>(memory + Config::kBarrierOffset + ForwardBarriers<Config>::kBytes)[stage];
  }
  __device__ QueryTile& upcoming() const { return tile(Config::kQueryStages); }  // the producer warp's own
  __device__ int& block_message(int stage) const {
    return reinterpret_cast<int*>(&tile(Config::kQueryStages + 1))[stage];
  }
  __device__ RepairList<Config::kQueryStages>& repair() const {
    return reinterpret_cast<RepairList<Config::kQueryStages>&>(block_message(Config::kKeyStages));
  }
};

}  // namespace selfattn::cuda::sm90
