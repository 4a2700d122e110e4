// Everything static about the kernel: tiles, warps, shared memory.
#pragma once
#include "flash/sm80/operand.cuh"
#include "params.h"

namespace selfattn::cuda::kv_cache {

// What a head tile costs beside its units, in units (schedule.cuh).
constexpr int kTileOverhead = 1;

// A thread block takes kTileRows rows, that is pairs of a query and a head of the group, against the keys of one kv
// head. Its warps stand in kKeyGroups groups of kRowWarps: each group has every kKeyGroups-th slice of the keys to
// itself, with a ring of its own in shared memory, and each of its warps 16 rows.
//   kSubSlices: of kPageMultiple keys, in a slice
//   kStages: slices in the ring of a group, at most
//   kBlocksAtOnce: thread blocks an SM, where each has kLeastStages
struct Pipeline {
  static constexpr int kStages = 6, kLeastStages = 3, kBlocksAtOnce = 2;
};

template <int kDim>
struct DecodeTiles : Pipeline {
  static constexpr int kRowWarps = 1, kKeyGroups = kDim == 256 ? 2 : 4, kSubSlices = kDim == 64 ? 2 : 1;
};

template <int kDim>
struct ChunkTiles : Pipeline {
  static constexpr int kRowWarps = 4, kKeyGroups = 1, kSubSlices = kDim == 64 ? 4 : 2;
};

template <class Element_, int kDim_, class Tiles_>
struct Config : Tiles_ {
  using Element = Element_;
  using Tiles_::kKeyGroups, Tiles_::kRowWarps, Tiles_::kStages, Tiles_::kSubSlices;
  static constexpr int kDim = kDim_;  // of queries and keys, and of values
  static constexpr int kTileRows = kCacheTileRows * kRowWarps, kSliceKeys = kPageMultiple * kSubSlices;
  static constexpr int kGroupThreads = kRowWarps * kWarpSize, kThreads = kKeyGroups * kGroupThreads;

  using Operand = sm80::OperandTile<kSliceKeys, kDim>;
  static constexpr int kSlotBytes = 2 * Operand::kBytes;  // a slice of keys, and of values
  static constexpr int kStageBytes = kKeyGroups * kSlotBytes;

  // Behind the rings.
  struct SharedState {
    float2 stats[kKeyGroups][kTileRows];  // SplitStats of the groups
    const float* outputs[kKeyGroups];     // of the groups, in their slots; null: the group had no slice
    int is_last_arriver;
  };
  static constexpr int shared_bytes(int stages) { return stages * kStageBytes + int(sizeof(SharedState)); }

  static constexpr int kOutputBytes = 16 * kDim * int(sizeof(float));  // of a warp, which leaves them in a slot
  static_assert(kKeyGroups == 1 || kRowWarps * kOutputBytes <= kSlotBytes);
  static_assert(shared_bytes(3) <= 99 * 1024, "what every card has");
  static_assert(kUnitKeys % kSliceKeys == 0);
};

}  // namespace selfattn::cuda::kv_cache
