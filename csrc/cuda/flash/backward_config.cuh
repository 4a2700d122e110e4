// Everything static about the backward kernels: tiles, stages, shared memory, barriers, flags.
#pragma once
#include <cstdint>

#include "backward.h"
#include "pipeline.cuh"
#include "repair_list.cuh"
#include "tensor_map.h"

namespace selfattn::cuda {

// dQ is summed in float32 patches of 64 queries x 64 columns, each in the order in which a warpgroup's accumulators
// hold its transpose: a quarter for each warp, in it the four accumulators 4i .. 4i + 3 of all lanes for one i after
// another.
constexpr int kPatchRows = 64;
constexpr int kPatchFloats = kPatchRows * kPanelColumns;
constexpr int kPatchWarps = 4;

// What the kernels want to know of query rows: for every 64 of them lse * log2(e), then delta = rowsum(dO * O) - dlse.
// A head's rows are filled up to whole tiles of any kernel.
constexpr int kStatRows = 64, kStatFloats = 2 * kStatRows, kStatTile = 128;
// Rows of a block of queries, and (up to head dimension 128) of keys, in the tables of segments.
constexpr int kQueryBlock = 64, kNarrowKeyBlock = 128;

// A query tile of the stream, as the loading warp announces it beside the barrier of its stage.
struct alignas(16) BlockInfo {
  int query_tile;
  int patch_row;  // its first row of patches, counted over all batches and heads; < 0: adds nothing to dQ
  int flags;
  int head;  // of the queries, counted over all batches
};
enum BlockFlag : int {
  kMaskWarpgroup0 = 1,  // some pairs of warpgroup 0 (1) are hidden
  kMaskWarpgroup1 = 2,
  kHiddenByRuns = 4,  // the row's segments are contiguous runs
  kHiddenByIds = 8,   // they are not, and the ids of this block differ
  kAllHidden = 16,    // stands in for the queries of a key tile that none sees
  kLastOfTile = 32,
  kEndOfStream = 64,      // no block; told to the warps that keep turns
  kSkipWarpgroup0 = 128,  // no pair of warpgroup 0 (1) is visible
  kSkipWarpgroup1 = 256,
  kExceptionalRows = 512,  // some rows have statistics out of the ordinary (backward_exceptional.cuh)
};

// What the otherwise idle warps of the loading warpgroup are at.
struct SideJob {
  int head, patch_row, part, section;  // head, counted over all batches, < 0: no more
  bool prepares;
};

// The keys at work, announced with K.
struct TileInfo {
  int key_tile, head, batch, section;  // key_tile < 0: no more
};

enum NamedBarrier : int { kConsumers = 1, kWarpgroup0 = 2, kWarpgroup1 = 3, kPasses = 4 };

// kHeadDim 64, 128: narrow; P and dS reach dV and dK from registers, a warpgroup owns 64 of 128 keys.
// kHeadDim 256: wide; P and dS go through shared memory, a warpgroup owns 128 of 256 columns of dK, dV and dQ.
template <class Element_, int kHeadDim_>
struct BackwardConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static_assert(kHeadDim == 64 || kHeadDim == 128 || kHeadDim == 256, "other dimensions run in the next larger one");
  static constexpr bool kIsWide = kHeadDim > 128;
  static constexpr bool kSumsQueries = true;  // dQ too
  static constexpr int kTileQ = kHeadDim == 64 ? 128 : 64;
  static constexpr int kTileKv = kIsWide ? 64 : kNarrowKeyBlock;
  static constexpr int kStages = 2;
  static constexpr int kKeyBuffers = 1;
  static constexpr int kPanels = kHeadDim / kPanelColumns;
  static constexpr int kPatchRowsOfTile = kTileQ / kPatchRows;
  static constexpr int kConsumers = 256, kThreads = 128 + kConsumers;
  static constexpr int kConsumerWarps = kConsumers / 32;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  // How the narrow kernels add dQ up, found by measurement (docs/kernels/backward.md): by the copy engine, where there
  // is memory for it, and after the next S has been issued. The wide kernel adds from registers, behind S.
  static constexpr bool kAddsByCopyEngine = kHeadDim == 128, kScoresBeforeAdding = kHeadDim == 64;
  // Steps of dP = V dO^T that take V from registers, which spares the memory that all products read through. All
  // operands of products have 212 of the 240 registers: more steps do not fit.
  static constexpr int kHeldSteps = kHeadDim == 128 ? 4 : 0;
  static constexpr int kStoreRows =
      kIsWide ? 64 : 16;  // box of the stores of dK and dV: a warpgroup's or a warp's rows
  // Who frees K and V: every warp when it has read them, or (wide) the thread that stores dK and dV from their memory.
  static constexpr int kFreeKeyArrivals = kIsWide ? 2 : kConsumerWarps;

  // Side jobs (backward_side_jobs.cuh): a job is a patch of the dQ sum, or kSideRows rows of out and of dO. The wide
  // kernel has no memory for them.
  static constexpr bool kHasSideJobs = !kIsWide;
  static constexpr int kSideBuffers = 2, kSideWorkers = 2;
  static constexpr int kSideBytes = kPatchFloats * 4, kSideRows = kPatchRows / kPanels;

  static constexpr int kQueryBytes = kTileQ * kHeadDim * 2, kKeyBytes = kTileKv * kHeadDim * 2;
  static constexpr int kScoreBytes = kTileQ * kTileKv * 2;

  struct SharedStorage {
    alignas(1024) unsigned char k[kKeyBuffers][kKeyBytes];
    unsigned char v[kKeyBuffers][kKeyBytes];
    unsigned char q[kStages][kQueryBytes];
    unsigned char grad_out[kStages][kQueryBytes];
    unsigned char grad_s[2][kScoreBytes];                              // narrow: dK on its way out, too
    unsigned char p_or_grad_v[kIsWide ? 2 * kScoreBytes : kKeyBytes];  // wide: two P; narrow: dV on its way out, and dQ
    unsigned char side[kSideBuffers][kHasSideJobs ? kSideBytes : 16];
    alignas(16) float row_stats[kStages][2 * kTileQ];
    alignas(16) int query_ids[kStages][kTileQ];
    BlockInfo block[kStages];
    TileInfo tile[kKeyBuffers];
    SideJob side_job[kSideBuffers];
    float side_sums[kSideRows];
    unsigned side_bits[kSideRows];
    uint64_t q_full[kStages], q_free[kStages], grad_out_full[kStages], grad_out_free[kStages];
    uint64_t k_full[kKeyBuffers], k_free[kKeyBuffers], v_full[kKeyBuffers], v_free[kKeyBuffers];
    uint64_t grad_s_full[2], grad_s_free[2];  // narrow
    uint64_t side_full[kSideBuffers], side_free[kSideBuffers];
    uint64_t has_turn[kStages], added[kStages];  // deterministic mode: a block may add to dQ; it has
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

// The split form, for head dimensions up to 128: one kernel for dK and dV, one for dQ, each with sums in registers.
// Seven products instead of five, but nothing is added up in global memory.

// dK and dV: as the narrow kernel, without dS in shared memory; the warpgroups do not wait for each other.
template <class Element_, int kHeadDim_>
struct KeyGradientConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static_assert(kHeadDim == 64 || kHeadDim == 128, "of two or one panels; wider heads take the fused form");
  static constexpr bool kIsWide = false, kSumsQueries = false, kHasSideJobs = false;
  static constexpr int kTileQ = 64, kTileKv = kNarrowKeyBlock;
  static constexpr int kStages = 3, kKeyBuffers = 2;
  static constexpr int kHeldSteps = 4;  // as above
  static constexpr int kPanels = kHeadDim / kPanelColumns;
  static constexpr int kPatchRowsOfTile = kTileQ / kPatchRows;
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
    RepairList<kKeyBuffers> repair;
    uint64_t q_full[kStages], q_free[kStages], grad_out_full[kStages], grad_out_free[kStages];
    uint64_t k_full[kKeyBuffers], k_free[kKeyBuffers], v_full[kKeyBuffers], v_free[kKeyBuffers];
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

// dQ: a tile of queries meets the key tiles that it sees. Q is held in registers, so that its memory is free at once;
// dO has two buffers, and dQ leaves through the one in use.
template <class Element_, int kHeadDim_>
struct QueryGradientConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static_assert(kHeadDim == 64 || kHeadDim == 128, "of two or one panels; wider heads take the fused form");
  static constexpr int kTileQ = kStatTile, kTileKv = 64;
  static constexpr int kStages = 4;
  static constexpr int kPanels = kHeadDim / kPanelColumns;
  static constexpr int kConsumers = 256, kThreads = 128 + kConsumers, kConsumerWarps = kConsumers / 32;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr int kStoreRows = 16;
  static constexpr int kQueryBytes = kTileQ * kHeadDim * 2, kKeyBytes = kTileKv * kHeadDim * 2;
  // What is told of a block of keys (BlockFlag), and of a tile of queries.
  struct KeyBlock {
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
    KeyBlock block[kStages];
    Tile tile;
    RepairList<2> repair;  // by buffers of dO
    uint64_t q_full, q_free, grad_out_free[2];
    uint64_t k_full[kStages], k_free[kStages], v_full[kStages], v_free[kStages];
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

enum class BackwardForm {
  kFused,
  kSplit,
  kEither,  // both are launched, and the segments say on the device which one works
};

// What the launcher derives from the shape. A pair is a key head of one batch, with its group of query heads. Pairs are
// worked on in sections, so that what their query rows read and add to stays in L2.
struct BackwardPlan {
  int query_tiles, key_tiles;
  int patch_rows;  // of one query head
  int group;       // query heads of a key head
  int pairs, pairs_of_section, sections;
  BackwardForm form;
  int64_t visits_of_split;  // form kEither: the split form serves rows of up to so many visits (SegmentTables)
  int batches_with_visits;  // whose visits are counted for that: of the whole call
  bool has_side_jobs;
  // Whether a key tile meets its query tiles from the first to the last: for single heads, so that thread blocks that
  // start together add to different rows. Where a tile goes through a group of heads, downwards keeps those thread
  // blocks at the same queries, which then stay in L2. The deterministic mode adds up dQ from the last key tile to the
  // first if upwards, else from the first to the last: the tile that is ahead then has the turn.
  bool walks_upward;
  // Under a causal limit a section's tiles after the first of each thread block begin one after another, each when
  // those before have come up to its diagonal: upwards these are together again.
  bool turns_upward;
  double logit_of_exponent;  // scale over scale * log2(e) as the kernels round it (backward_exceptional.cuh)
  int query_blocks;          // of a row, in the tables of segments
  int stat_groups;           // of a head
  float* row_stats;          // (batch, num_heads, stat_groups, kStatFloats)
  float* grad_q_sum;         // (batch, num_heads, patch_rows, kPanels, kPatchFloats)
  int* turns;                // (batch, num_heads, query_tiles): key tiles added to dQ so far; deterministic mode only
  int* repair_list;          // (the more of query and key tiles, batch, heads) for RepairList; split form
  int* counters;  // next tile, next side job, next query tile and whether there are exact statistics (split form), and
                  // for every section: query rows prepared, key tiles done

  __host__ __device__ int work_tiles() const { return pairs * key_tiles; }
  __host__ __device__ int count_of_counters() const { return 4 + 2 * sections; }
  __host__ __device__ int pairs_in(int section) const {
    const int rest = pairs - section * pairs_of_section;
    return rest < pairs_of_section ? rest : pairs_of_section;
  }
  __host__ __device__ int first_head_of(int section) const {
    return section * pairs_of_section * group;
  }  // over all batches
  __host__ __device__ int heads_in(int section) const { return pairs_in(section) * group; }
  // The heads that the prepare and the finish kernel care for.
  __host__ __device__ int heads_prepared_ahead() const { return has_side_jobs ? heads_in(0) : pairs * group; }
  __host__ __device__ int first_head_finished_behind() const { return has_side_jobs ? first_head_of(sections - 1) : 0; }
  __device__ int* next_tile() const { return counters; }
  __device__ int* next_side_job() const { return counters + 1; }
  __device__ int* next_query_tile() const { return counters + 2; }
  __device__ int* has_exact_stats() const { return counters + 3; }
  __device__ int* rows_prepared(int section) const { return counters + 4 + section; }
  __device__ int* tiles_done(int section) const {
    return counters + 4 + sections + section;
  }  // by every multiplying warp
};

}  // namespace selfattn::cuda
