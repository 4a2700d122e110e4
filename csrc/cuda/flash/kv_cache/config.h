// Everything static about the kernels: tiles, warps, rings.
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
// itself, with a ring of its own in shared memory, and each of its warps kWarpRows rows.
//   kSubSlices: of kPageMultiple keys, in a slice
//   kMostBlocks: thread blocks an SM
//   kMostStages: slices in the ring of a group
struct Pipeline {
  static constexpr int kLeastStages = 2;
};

// Of decode_kernel.cuh. kRows: 8 or 16. kIsSmall_: for cards that have less than two stages of the others: 99 KB.
template <int kDim, int kRows, bool kIsSmall_>
struct DecodeTiles : Pipeline {
  static constexpr bool kIsSmall = kIsSmall_;
  static constexpr int kWarpRows = kRows, kRowWarps = 1, kKeyGroups = 4, kSubSlices = 256 / kDim, kMostBlocks = 1,
                       kMostStages = 4;
};
template <int kDim, int kRows>
struct DecodeTiles<kDim, kRows, true> : Pipeline {
  static constexpr bool kIsSmall = true;
  static constexpr int kWarpRows = kRows, kRowWarps = 1, kKeyGroups = kDim == 256 ? 2 : 4,
                       kSubSlices = kDim == 64 ? 2 : 1, kMostBlocks = 1, kMostStages = 4;
};

// Of chunk_kernel.cuh.
template <int kDim>
struct ChunkTiles : Pipeline {
  static constexpr int kWarpRows = 16, kRowWarps = 4, kKeyGroups = 1, kSubSlices = kDim == 64 ? 4 : 2, kMostBlocks = 2,
                       kMostStages = 3;
};

template <class Element_, int kDim_, class Tiles>
struct Config : Tiles {
  using Element = Element_;
  using Tiles::kKeyGroups, Tiles::kRowWarps, Tiles::kWarpRows, Tiles::kSubSlices;
  static constexpr int kDim = kDim_;  // of queries and keys, and of values
  static constexpr int kTileRows = kWarpRows * kRowWarps, kSliceKeys = kPageMultiple * kSubSlices;
  static constexpr int kWarps = kKeyGroups * kRowWarps;  // that attend
  static constexpr int kGroupThreads = kRowWarps * kWarpSize;
  static constexpr bool kHoldsQuery = kDim <= 128;  // in registers, of 16 rows

  using Query = sm80::OperandTile<kTileRows, kDim>;
  using Operand = sm80::OperandTile<kSliceKeys, kDim>;
  static constexpr int kSlotBytes = 2 * Operand::kBytes;  // a slice of keys, and of values
  static constexpr int kStageBytes = kKeyGroups * kSlotBytes;
  static_assert(kUnitKeys % kSliceKeys == 0);
};

}  // namespace selfattn::cuda::kv_cache
