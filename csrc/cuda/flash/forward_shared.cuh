// What the roles of the forward kernel share: the kernel's parameters and the layout of shared memory.
#pragma once
#include "../ptx/mbarrier.cuh"
#include "config.h"
#include "scheduler.cuh"

namespace selfattn::cuda {

struct ForwardKernelParams {
  CUtensorMap query, key, value, out;  // boxes: query, out 64 rows; key, value a key block
  AttentionShape shape;
  AttentionWindow window;
  float scale;
  float* lse;          // (batch, num_heads, query_length)
  const float* sinks;  // (num_heads,) or null
  SegmentTables segments;
  int* repair_list;  // (tiles) of each tile that is on a list, the tile behind it (forward_repair.cuh)
  int* counters;     // [0]: tiles taken after each thread block's first; null where there are no others
  TileSchedule schedule;
};

// How the keys of a tile are limited besides the window.
enum TileMode : int { kNoSegments = -1, kRuns = kContiguous, kIds = kGeneral };

// What the loading warp tells the others about a tile; index -1 ends the work.
struct QueryTile {
  int index, head;
  int first_block, end_block;
  int mode;
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
  __device__ QueryTile& upcoming() const { return tile(Config::kQueryStages); }  // the loading warp's own
  __device__ int& block_message(int stage) const {
    return reinterpret_cast<int*>(&tile(Config::kQueryStages + 1))[stage];
  }
  // For tiles that are computed once more (forward_repair.cuh): whether that of a stage is one of them, whether any is,
  // and the first of the list.
  __device__ int& is_marked(int stage) const { return (&block_message(Config::kKeyStages))[stage]; }
  __device__ int& is_any_marked() const { return is_marked(Config::kQueryStages); }
  // Without a branch: behind one that lanes may take apart, ptxas no longer keeps matrix descriptors in uniform
  // registers.
  __device__ void mark_if(bool condition, int stage) const {
    ptx::store_shared_if(condition, ptx::shared_address(&is_marked(stage)), 1);
    ptx::store_shared_if(condition, ptx::shared_address(&is_any_marked()), 1);
  }
  __device__ int& repair_list() const { return is_marked(Config::kQueryStages + 1); }
};

}  // namespace selfattn::cuda
