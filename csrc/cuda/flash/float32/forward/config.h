// Everything static about the float32 forward kernel: tiles, warps, shared memory.
#pragma once
#include "flash/float32/tile.cuh"

namespace selfattn::cuda::float32 {

// Of one head dimension: rows of a query tile and of a key tile, the same for every precision; rows of a warp; whether
// it keeps its rows of Q in registers. Reading shared memory is what bounds kTf32.
template <int kDim, Precision kPrecision>
struct ForwardTiles;

template <Precision kPrecision>
struct ForwardTiles<64, kPrecision> {
  static constexpr int kTileQuery = 128, kTileKey = 32, kWarpRows = 32, kBlocksAtOnce = 2;
  static constexpr bool kHoldsQuery = kPrecision == Precision::kTf32;
};
template <Precision kPrecision>
struct ForwardTiles<128, kPrecision> {
  static constexpr int kTileQuery = 128, kTileKey = 32, kWarpRows = 32, kBlocksAtOnce = 2;
  static constexpr bool kHoldsQuery = false;
};
template <Precision kPrecision>
struct ForwardTiles<256, kPrecision> {
  static constexpr int kTileQuery = 64, kTileKey = 16, kWarpRows = 16, kBlocksAtOnce = 2;
  static constexpr bool kHoldsQuery = false;
};

template <int kDim_, Precision kPrecision_, RowLayout kLayout_ = RowLayout::kAligned>
struct ForwardConfig : ForwardTiles<kDim_, kPrecision_> {
  using Tiles = ForwardTiles<kDim_, kPrecision_>;
  static constexpr Precision kPrecision = kPrecision_;
  static constexpr RowLayout kLayout = kLayout_;
  static constexpr int kDim = kDim_;  // of q and k, and of v
  static constexpr int kThreads = Tiles::kTileQuery / Tiles::kWarpRows * kWarpSize;
  static constexpr int kRowGroups = Tiles::kWarpRows / kProductRows;  // in a warp

  using Query = FloatTile<Tiles::kTileQuery, kDim, kLayout>;
  using Key = FloatTile<Tiles::kTileKey, kDim, kLayout>;
  using Value = Key;

  struct SharedStorage {
    alignas(128) unsigned char q[Query::kBytes];
    alignas(128) unsigned char k[Key::kBytes];
    alignas(128) unsigned char v[Value::kBytes];
  };
  static_assert(sizeof(SharedStorage) <= kMaxSharedBytes);
  static_assert(Tiles::kTileKey % 16 == 0 && Tiles::kWarpRows % kProductRows == 0);
};

}  // namespace selfattn::cuda::float32
