// Everything static about the backward kernels: tiles, stages, shared memory, barriers, flags.
#pragma once
#include <cstdint>

#include "flash/params.h"
#include "flash/sm90/pipeline.cuh"
#include "flash/sm90/repair_list.cuh"
#include "flash/tensor_map.h"

namespace selfattn::cuda::sm90 {

// dQ is summed in a float32 accumulator of tiles of 64 queries x 64 columns, each in the order in which a warpgroup's
// accumulators hold its transpose: a slice for each warp, in it the four accumulators 4i .. 4i + 3 of all lanes for one
// i after another.
constexpr int kDqTileRows = 64;
constexpr int kDqTileFloats = kDqTileRows * kPanelColumns;
constexpr int kDqTileWarps = 4;

// What the kernels want to know of query rows: for every 64 of them lse * log2(e), then delta = rowsum(dO * O) - dlse.
// A head's rows are filled up to whole tiles of any kernel.
constexpr int kStatRows = 64, kStatFloats = 2 * kStatRows, kStatTile = 128;
// Rows of a block of queries, and (up to head dimension 128) of keys, in the tables of segments.
constexpr int kQueryBlock = 64, kNarrowKeyBlock = 128;

// A query tile that a tile of keys meets, as the producer warp announces it beside the barrier of its stage.
struct alignas(16) BlockInfo {
  int query_tile;
  int dq_tile_row;  // its first row of dQ tiles, counted over all batches and heads; < 0: adds nothing to dQ
  int flags;
  int head;  // of the queries, counted over all batches
};
enum BlockFlag : int {
  kMaskWarpgroup0 = 1,  // some pairs of warpgroup 0 (1) are masked
  kMaskWarpgroup1 = 2,
  kMaskedByRuns = 4,  // the row's segments are contiguous runs
  kMaskedByIds = 8,   // they are not, and the ids of this block differ
  kAllMasked = 16,    // stands in for the queries of a key tile that none sees
  kLastOfTile = 32,
  kEndOfBlocks = 64,      // no block; told to the warps of the dQ semaphore
  kSkipWarpgroup0 = 128,  // all pairs of warpgroup 0 (1) are masked
  kSkipWarpgroup1 = 256,
  kExceptionalRows = 512,  // some rows have statistics out of the ordinary (exceptional.cuh)
};

// What the otherwise idle warps of the producer warpgroup are at.
struct BackgroundJob {
  int head, dq_tile_row, part, section;  // head, counted over all batches, < 0: no more
  bool preprocesses;
};

// The keys at work, announced with K.
struct TileInfo {
  int key_tile, head, batch, section;  // key_tile < 0: no more
  int warpgroups;                      // two-pass form: a bit for each one that stores
};

// Barrier 0 is __syncthreads.
enum NamedBarrier : int {
  kConsumerBarrier = 1,    // both consumer warpgroups
  kWarpgroup0Barrier = 2,  // one of them; kWarpgroup0Barrier + warpgroup
  kWarpgroup1Barrier = 3,
  kPassBarrier = 4,  // producer and consumers, between the passes
};

// kHeadDim 64, 128: P and dS reach dV and dK from registers, a warpgroup owns 64 of 128 keys.
// kHeadDim 256: P and dS go through shared memory, a warpgroup owns 128 of 256 columns of dK, dV and dQ.
template <class Element_, int kHeadDim_, bool kHasSoftcap_ = false>
struct BackwardConfig {
  using Element = Element_;
  static constexpr bool kHasSoftcap = kHasSoftcap_;
  static constexpr int kHeadDim = kHeadDim_;
  static_assert(kHeadDim == 64 || kHeadDim == 128 || kHeadDim == 256, "other dimensions run in the next larger one");
  static constexpr bool kIsD256 = kHeadDim > 128;
  static constexpr bool kSumsQueries = true;  // dQ too
  static constexpr int kTileQ = kHeadDim == 64 ? 128 : 64;
  static constexpr int kTileKv = kIsD256 ? 64 : kNarrowKeyBlock;
  static constexpr int kStages = 2;
  static constexpr int kKeyBuffers = 1;
  static constexpr int kPanels = kHeadDim / kPanelColumns;
  static constexpr int kDqTileRowsPerTile = kTileQ / kDqTileRows;
  static constexpr int kConsumers = 256, kThreads = 128 + kConsumers;
  static constexpr int kConsumerWarps = kConsumers / 32;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  // How the kernels up to D 128 add dQ up, found by measurement (docs/kernels/backward.md): by TMA, where there
  // is memory for it, and after the next S has been issued. The kernel for D 256 adds from registers, behind S.
  static constexpr bool kAddsByTma = kHeadDim == 128, kScoresBeforeAdding = kHeadDim == 64;
  // Steps of dP = V dO^T that take V from registers, which spares the memory that all products read through. All
  // operands of products have 212 of the 240 registers: more steps do not fit, and with softcap not even so many.
  static constexpr int kHeldSteps = kHeadDim == 128 ? (kHasSoftcap ? 3 : 4) : 0;
  static constexpr int kStoreRows =
      kIsD256 ? 64 : 16;  // box of the stores of dK and dV: a warpgroup's or a warp's rows
  // Who frees K and V: every warp when it has read them, or (D 256) the thread that stores dK and dV from their memory.
  static constexpr int kKeyEmptyArrivals = kIsD256 ? 2 : kConsumerWarps;

  // Background jobs (background_warps.cuh): a job is a tile of the dQ accumulator, or kBackgroundRows rows of out and
  // of dO. The kernel for D 256 has no memory for them.
  static constexpr bool kHasBackgroundWarps = !kIsD256;
  static constexpr int kBackgroundBuffers = 2, kBackgroundWorkers = 2;
  static constexpr int kBackgroundBytes = kDqTileFloats * 4, kBackgroundRows = kDqTileRows / kPanels;

  static constexpr int kQueryBytes = kTileQ * kHeadDim * 2, kKeyBytes = kTileKv * kHeadDim * 2;
  static constexpr int kScoreBytes = kTileQ * kTileKv * 2;

  struct SharedStorage {
    alignas(1024) unsigned char k[kKeyBuffers][kKeyBytes];
    unsigned char v[kKeyBuffers][kKeyBytes];
    unsigned char q[kStages][kQueryBytes];
    unsigned char grad_out[kStages][kQueryBytes];
    unsigned char grad_s[2][kScoreBytes];                              // up to D 128: dK on its way out, too
    unsigned char p_or_grad_v[kIsD256 ? 2 * kScoreBytes : kKeyBytes];  // D 256: two P; else: dV on its way out, and dQ
    unsigned char background[kBackgroundBuffers][kHasBackgroundWarps ? kBackgroundBytes : 16];
    alignas(16) float row_stats[kStages][2 * kTileQ];
    alignas(16) int query_ids[kStages][kTileQ];
    BlockInfo block[kStages];
    TileInfo tile[kKeyBuffers];
    BackgroundJob background_job[kBackgroundBuffers];
    float background_sums[kBackgroundRows];
    unsigned background_bits[kBackgroundRows];
    uint64_t q_full[kStages], q_empty[kStages], grad_out_full[kStages], grad_out_empty[kStages];
    uint64_t k_full[kKeyBuffers], k_empty[kKeyBuffers], v_full[kKeyBuffers], v_empty[kKeyBuffers];
    uint64_t grad_s_full[2], grad_s_empty[2];  // up to D 128
    uint64_t background_full[kBackgroundBuffers], background_empty[kBackgroundBuffers];
    uint64_t may_add[kStages], added[kStages];  // deterministic mode: a block may add to dQ; it has
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

// The two-pass form, for head dimensions up to 128: one kernel for dK and dV, one for dQ, each with sums in registers.
// Seven products instead of five, but nothing is added up in global memory.

// dK and dV: as the kernel up to D 128, without dS in shared memory; the warpgroups do not wait for each other.
template <class Element_, int kHeadDim_, bool kHasSoftcap_ = false>
struct DkdvConfig {
  using Element = Element_;
  static constexpr bool kHasSoftcap = kHasSoftcap_;
  static constexpr int kHeadDim = kHeadDim_;
  static_assert(kHeadDim == 64 || kHeadDim == 128, "of two or one panels; wider heads take the single-pass form");
  static constexpr bool kIsD256 = false, kSumsQueries = false, kHasBackgroundWarps = false;
  static constexpr int kTileQ = 64, kTileKv = kNarrowKeyBlock;
  static constexpr int kStages = 3, kKeyBuffers = 2;
  static constexpr int kHeldSteps = kHasSoftcap ? 0 : 4;  // as above
  static constexpr int kPanels = kHeadDim / kPanelColumns;
  static constexpr int kDqTileRowsPerTile = kTileQ / kDqTileRows;
  static constexpr int kConsumers = 256, kThreads = 128 + kConsumers, kConsumerWarps = kConsumers / 32;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr int kStoreRows = 16;  // box of the stores of dK and dV: a warp's rows
  static constexpr int kQueryBytes = kTileQ * kHeadDim * 2, kKeyBytes = kTileKv * kHeadDim * 2;

  struct SharedStorage {
    alignas(1024) unsigned char k[kKeyBuffers][kKeyBytes];  // dK and dV on their way out, too
    unsigned char v[kKeyBuffers][kKeyBytes];
    unsigned char q[kStages][kQueryBytes];
    unsigned char grad_out[kStages][kQueryBytes];
    float row_stats[kStages][2 * kTileQ];
    int query_ids[kStages][kTileQ];
    BlockInfo block[kStages];
    TileInfo tile[kKeyBuffers];
    RepairList<kKeyBuffers, 2> repair;  // marked by warpgroups
    uint64_t q_full[kStages], q_empty[kStages], grad_out_full[kStages], grad_out_empty[kStages];
    uint64_t k_full[kKeyBuffers], k_empty[kKeyBuffers], v_full[kKeyBuffers], v_empty[kKeyBuffers];
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

// dQ: a tile of queries meets the key tiles that it sees. Q is held in registers, so that its memory is free at once;
// dO has two buffers, and dQ leaves through the one in use.
template <class Element_, int kHeadDim_, bool kHasSoftcap_ = false>
struct DqConfig {
  using Element = Element_;
  static constexpr bool kHasSoftcap = kHasSoftcap_;
  static constexpr int kHeadDim = kHeadDim_;
  static_assert(kHeadDim == 64 || kHeadDim == 128, "of two or one panels; wider heads take the single-pass form");
  static constexpr int kTileQ = kStatTile, kTileKv = 64;
  static constexpr int kStages = 4;
  static constexpr int kPanels = kHeadDim / kPanelColumns;
  static constexpr int kConsumers = 256, kThreads = 128 + kConsumers, kConsumerWarps = kConsumers / 32;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr int kStoreRows = 16;
  static constexpr int kQueryBytes = kTileQ * kHeadDim * 2, kKeyBytes = kTileKv * kHeadDim * 2;
  // What is told of a block of keys (BlockFlag), and of a tile of queries.
  struct KeyTileInfo {
    int key_tile, flags;
  };
  struct Tile {
    int query_tile, head, batch;  // query_tile < 0: no more
    int mode;                     // SegmentMode, or -1 without segments
  };

  struct SharedStorage {
    alignas(1024) unsigned char q[kQueryBytes];  // [warpgroup][panel][64 rows]
    unsigned char grad_out[2][kQueryBytes];
    unsigned char k[kStages][kKeyBytes];
    unsigned char v[kStages][kKeyBytes];
    int rows[2][kTileQ];  // runs: first key and end of each query's run; ids: [0] the ids of the queries
    KeyTileInfo block[kStages];
    Tile tile;
    RepairList<2> repair;  // by buffers of dO
    uint64_t q_full, q_empty, grad_out_empty[2];
    uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

}  // namespace selfattn::cuda::sm90
