// Everything static about the kernel: tiles, warps, shared memory.
#pragma once
#include "flash/sm80/operand.cuh"
#include "params.h"
#include "schedule.cuh"

namespace selfattn::cuda::kv_cache {

// Of a row and some of its keys: the largest score, and the sum of exponentials less it.
using SplitStats = float2;

// What a head tile costs beside its units, in units (schedule.cuh).
constexpr int kHeadTileOverhead = 4;

// A thread block takes kTileRows rows, that is pairs of a query and a head of the group, against the keys of one kv
// head. Its warps stand in kKeyGroups groups of kRowWarps: each group has every kKeyGroups-th slice of the keys to
// itself, with a ring of its own in shared memory, and each of its warps 16 rows.
//   kFinishers: warps beside them that finish pieces, where there are several groups (finish.cuh)
//   kSubSlices: of kPageMultiple keys, in a slice
//   kMostBlocks: thread blocks an SM
struct Pipeline {
  static constexpr int kMostStages = 3, kLeastStages = 2;  // slices in the ring of a group
};

// kSmall: for cards that have less than two stages of the others: 99 KB.
template <int kDim, bool kIsSmall>
struct DecodeTiles : Pipeline {
  static constexpr int kRowWarps = 1, kKeyGroups = kDim == 64 ? 8 : 4, kSubSlices = kDim == 256 ? 1 : 2,
                       kMostBlocks = 1;
};
template <int kDim>
struct DecodeTiles<kDim, true> : Pipeline {
  static constexpr int kRowWarps = 1, kKeyGroups = kDim == 256 ? 2 : 4, kSubSlices = kDim == 64 ? 2 : 1,
                       kMostBlocks = 1;
};

template <int kDim>
struct ChunkTiles : Pipeline {
  static constexpr int kRowWarps = 4, kKeyGroups = 1, kSubSlices = kDim == 64 ? 4 : 2, kMostBlocks = 2;
};

template <class Element_, int kDim_, class Tiles>
struct Config : Tiles {
  using Element = Element_;
  using Tiles::kKeyGroups, Tiles::kRowWarps, Tiles::kSubSlices, Tiles::kLeastStages, Tiles::kMostStages;
  static constexpr int kDim = kDim_;  // of queries and keys, and of values
  static constexpr int kTileRows = kCacheTileRows * kRowWarps, kSliceKeys = kPageMultiple * kSubSlices;
  static constexpr int kWarps = kKeyGroups * kRowWarps, kFinishers = kKeyGroups > 1 ? 4 : 0;
  static constexpr int kThreads = (kWarps + kFinishers) * kWarpSize;
  static constexpr int kGroupThreads = kRowWarps * kWarpSize;
  static constexpr bool kHoldsQuery = kDim <= 128;  // in registers

  using Query = sm80::OperandTile<kTileRows, kDim>;
  using Operand = sm80::OperandTile<kSliceKeys, kDim>;
  static constexpr int kSlotBytes = 2 * Operand::kBytes;  // a slice of keys, and of values
  static constexpr int kStageBytes = kKeyGroups * kSlotBytes;

  // Behind the rings. What there are two of is of two pieces in turn.
  struct SharedState {
    KernelParams params;
    alignas(128) unsigned char query[kFinishers ? 2 : 1][Query::kBytes];
    SplitStats stats[2][kKeyGroups][kTileRows];  // of the groups
    const float* outputs[2][kKeyGroups];         // of the groups, in their slots; null: the group had no slice
    uint64_t begun[2], attended[2], merged[2];   // barriers
    Walk pieces[2];
    int has_piece[2];
    Share shares[kWarps + kFinishers];  // the same in all
    Walk walks[kWarps + kFinishers];    // of groups with finishers what is loaded, else what is attended to
    Walk loading[kFinishers ? 1 : kWarps];
    int is_last_arriver;
  };
  static constexpr int shared_bytes(int stages) { return stages * kStageBytes + int(sizeof(SharedState)); }

  static constexpr int kOutputBytes =
      kCacheTileRows * kDim * int(sizeof(float));  // of a warp, which leaves them in a slot
  static_assert(kKeyGroups == 1 || kRowWarps * kOutputBytes <= kSlotBytes);
  static_assert(kUnitKeys % kSliceKeys == 0);
};

}  // namespace selfattn::cuda::kv_cache
