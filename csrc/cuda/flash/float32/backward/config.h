// Everything static about the float32 backward kernels: tiles, warps, shared memory.
#pragma once
#include "flash/float32/tile.cuh"

namespace selfattn::cuda::float32 {

// The rows of the workspace are filled up to whole tiles of any kernel.
constexpr int kStatRows = 128;

// Of the kernel for dQ: a thread block has kTileQuery queries and walks over blocks of kTileKey keys, which kKeyParts
// warps with the same queries share out; their sums are added at the end.
template <int kDim>
struct DqTiles;

template <>
struct DqTiles<64> {
  static constexpr int kTileQuery = 128, kWarpRows = 32, kTileKey = 32, kKeyParts = 1, kBlocksAtOnce = 2;
};
template <>
struct DqTiles<128> {
  static constexpr int kTileQuery = 64, kWarpRows = 16, kTileKey = 32, kKeyParts = 1, kBlocksAtOnce = 2;
};
template <>
struct DqTiles<256> {
  static constexpr int kTileQuery = 32, kWarpRows = 16, kTileKey = 16, kKeyParts = 2, kBlocksAtOnce = 2;
};

// Of the kernel for dK and dV: a thread block has kTileKey keys and walks over blocks of kTileQuery queries. Where the
// registers do not hold both sums (kSumsTogether false) some warps have the sum of dK and some that of dV.
template <int kDim>
struct DkdvTiles;

template <>
struct DkdvTiles<64> {
  static constexpr int kTileKey = 64, kWarpRows = 16, kTileQuery = 32, kBlocksAtOnce = 3;
  static constexpr bool kSumsTogether = true;
};
template <>
struct DkdvTiles<128> {
  static constexpr int kTileKey = 64, kWarpRows = 16, kTileQuery = 32, kBlocksAtOnce = 2;
  static constexpr bool kSumsTogether = true;
};
template <>
struct DkdvTiles<256> {
  static constexpr int kTileKey = 32, kWarpRows = 16, kTileQuery = 16, kBlocksAtOnce = 2;
  static constexpr bool kSumsTogether = false;
};

// Rows of the blocks in the tables of segments, of queries and of keys. A tile holds whole blocks, or a block whole
// tiles, which have their turns one after the other.
constexpr int kTableBlock = 64;

template <int kTileRows_>
struct TableBlocks {
  static constexpr int kTileRows = kTileRows_;
  static constexpr int kOrderedRows = kTileRows < kTableBlock ? kTableBlock : kTileRows;  // that have a turn together
  static constexpr int kOfTile = kOrderedRows / kTableBlock, kTilesTogether = kOrderedRows / kTileRows;
  static_assert(kOrderedRows % kTableBlock == 0 && kOrderedRows % kTileRows == 0 && kOfTile <= 2);
  static_assert(kStatRows % kOrderedRows == 0);
};

template <int kDim>
struct BackwardTiles {
  using Queries = TableBlocks<DqTiles<kDim>::kTileQuery>;
  using Keys = TableBlocks<DkdvTiles<kDim>::kTileKey>;
  static_assert(Keys::kOfTile == 1, "the order of key tiles is one of blocks");
  static_assert(kTableBlock % DqTiles<kDim>::kTileKey == 0 && kTableBlock % DkdvTiles<kDim>::kTileQuery == 0);
};

template <int kDim_, Precision kPrecision_, RowLayout kLayout_ = RowLayout::kAligned>
struct DqConfig : DqTiles<kDim_> {
  using Tiles = DqTiles<kDim_>;
  static constexpr Precision kPrecision = kPrecision_;
  static constexpr RowLayout kLayout = kLayout_;
  static constexpr int kDim = kDim_;
  static constexpr int kRowWarps = Tiles::kTileQuery / Tiles::kWarpRows,
                       kThreads = kRowWarps * Tiles::kKeyParts * kWarpSize;
  static constexpr int kRowGroups = Tiles::kWarpRows / kProductRows;   // in a warp
  static constexpr int kColumns = Tiles::kTileKey / Tiles::kKeyParts;  // of a block of keys, for a warp
  using Table = typename BackwardTiles<kDim>::Queries;

  using Query = FloatTile<Tiles::kTileQuery, kDim, kLayout>;  // and dO
  using Key = FloatTile<Tiles::kTileKey, kDim, kLayout>;      // and V

  struct SharedStorage {
    alignas(128) unsigned char q[Query::kBytes];  // at the end the sums of other parts
    alignas(128) unsigned char grad_out[Query::kBytes];
    alignas(128) unsigned char k[Key::kBytes];
    alignas(128) unsigned char v[Key::kBytes];
  };
  static_assert(sizeof(SharedStorage) <= kMaxSharedBytes);
  static_assert(kColumns % 8 == 0 && Tiles::kKeyParts <= 2);
};

template <int kDim_, Precision kPrecision_, bool kHasSoftcap_, RowLayout kLayout_ = RowLayout::kAligned>
struct DkdvConfig : DkdvTiles<kDim_> {
  using Tiles = DkdvTiles<kDim_>;
  static constexpr Precision kPrecision = kPrecision_;
  static constexpr RowLayout kLayout = kLayout_;
  static constexpr bool kHasSoftcap = kHasSoftcap_;
  static constexpr int kDim = kDim_;
  static constexpr int kRowWarps = Tiles::kTileKey / Tiles::kWarpRows,
                       kThreads = kRowWarps * (Tiles::kSumsTogether ? 1 : 2) * kWarpSize;
  static constexpr int kRowGroups = Tiles::kWarpRows / kProductRows;
  using Table = typename BackwardTiles<kDim>::Keys;

  using Key = FloatTile<Tiles::kTileKey, kDim, kLayout>;      // and V
  using Query = FloatTile<Tiles::kTileQuery, kDim, kLayout>;  // and dO

  struct SharedStorage {
    alignas(128) unsigned char k[Key::kBytes];
    alignas(128) unsigned char v[Key::kBytes];
    alignas(128) unsigned char q[Query::kBytes];
    alignas(128) unsigned char grad_out[Query::kBytes];
    alignas(16) float lse[Tiles::kTileQuery];  // of the queries in q (row_stats.cuh)
    alignas(16) float delta[Tiles::kTileQuery];
  };
  static_assert(sizeof(SharedStorage) <= kMaxSharedBytes);
};

}  // namespace selfattn::cuda::float32
