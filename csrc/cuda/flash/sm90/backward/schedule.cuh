// What a call's kernels are told beside its tensors: the form that works, the order of the tiles, the scratch memory.
#pragma once
#include <cstdint>

#include "flash/tile/softcap.cuh"

namespace selfattn::cuda::sm90 {

enum class BackwardForm {
  kSinglePass,
  kTwoPass,
  kEither,  // both are launched, and the segments say on the device which one works
};

// What the launcher derives from the shape. A KV group is a key head of one batch with its query heads. KV groups are
// worked on in sections, so that what their query rows read and add to stays in L2.
struct BackwardSchedule {
  int query_tiles, key_tiles;
  int dq_tile_rows;  // of one query head
  int group_size;    // query heads of a key head
  int kv_groups, kv_groups_per_section, sections;
  BackwardForm form;
  int64_t max_blocks_of_two_pass;  // form kEither: the two-pass form serves calls of up to so many computed_blocks
                                   // (SegmentTables)
  int batches_counted;             // whose computed_blocks are counted for that: of the whole call
  bool has_background_warps;
  // Whether a key tile meets its query tiles from the first to the last: for single heads, so that thread blocks that
  // start together add to different rows. Where a tile goes through a group of heads, downwards keeps those thread
  // blocks at the same queries, which then stay in L2. The deterministic mode adds up dQ from the last key tile to the
  // first if upwards, else from the first to the last: the tile that is ahead then comes first.
  bool walks_upward;
  // Under a causal limit a section's tiles after the first of each thread block begin one after another, each when
  // those before have come up to its diagonal: upwards these are together again.
  bool reverses;
  double logit_of_exponent;  // scale over scale * log2(e) as the kernels round it (exceptional.cuh)
  int query_blocks;          // of a row, in the tables of segments
  int stat_groups;           // of a head
  float* row_stats;          // (batch, num_heads, stat_groups, kStatFloats)
  float* dq_accumulator;     // (batch, num_heads, dq_tile_rows, kPanels, kDqTileFloats)
  int* dq_semaphores;        // (batch, num_heads, query_tiles): key tiles added to dQ so far; deterministic mode only
  int* repair_list;          // (the more of query and key tiles, batch, heads) for RepairList; two-pass form
  int* counters;    // next tile, next background job, next query tile and whether there are exact statistics (two-pass
                    // form), and for every section: query rows preprocessed, key tiles done
  Softcap softcap;  // read by kernels with kHasSoftcap

  __host__ __device__ int work_tiles() const { return kv_groups * key_tiles; }
  __host__ __device__ int count_of_counters() const { return 4 + 2 * sections; }
  __host__ __device__ int kv_groups_in(int section) const {
    const int rest = kv_groups - section * kv_groups_per_section;
    return rest < kv_groups_per_section ? rest : kv_groups_per_section;
  }
  __host__ __device__ int first_head_of(int section) const {
    return section * kv_groups_per_section * group_size;
  }  // over all batches
  __host__ __device__ int heads_in(int section) const { return kv_groups_in(section) * group_size; }
  // The heads that the preprocess and the postprocess kernel care for.
  __host__ __device__ int heads_preprocessed_ahead() const {
    return has_background_warps ? heads_in(0) : kv_groups * group_size;
  }
  __host__ __device__ int first_head_postprocessed_behind() const {
    return has_background_warps ? first_head_of(sections - 1) : 0;
  }
  __device__ int* next_tile() const { return counters; }
  __device__ int* next_background_job() const { return counters + 1; }
  __device__ int* next_query_tile() const { return counters + 2; }
  __device__ int* has_exact_stats() const { return counters + 3; }
  __device__ int* rows_preprocessed(int section) const { return counters + 4 + section; }
  __device__ int* tiles_done(int section) const { return counters + 4 + sections + section; }  // by every consumer warp
};

}  // namespace selfattn::cuda::sm90
