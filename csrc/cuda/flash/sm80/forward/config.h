// Everything static about the forward kernel: tiles, warps, shared memory.
#pragma once
#include "flash/sm80/operand.cuh"
#include "flash/tile/window.h"

namespace selfattn::cuda::sm80 {

// What the mask may cut off. The narrower kinds save the others' bookkeeping.
enum class MaskKind {
  kFull,    // nothing but the end of the keys
  kCausal,  // keys right of the diagonal
  kMasked,  // windows and segments
};

// Of one pair of head dimensions. The tiles fit the 99 KB that a block may have on every card from 8.0 on.
//   kHeldSteps: of 16 columns of Q, in registers
//   kMostBuffers: of a block of K, and of V. One lets the copies of K run beside the softmax and those of V beside the
//     scores, two all of the next block's beside this one; but one may let a second thread block into an SM
//     (buffers_for in launch.cuh).
template <int kDimQk, int kDimV>
struct ForwardTiles;

template <>
struct ForwardTiles<64, 64> {
  static constexpr int kWarps = 4, kWarpRows = 32, kTileKey = 128, kBlocksAtOnce = 2, kHeldSteps = 0, kMostBuffers = 2;
};
template <>
struct ForwardTiles<128, 128> {
  static constexpr int kWarps = 4, kWarpRows = 32, kTileKey = 64, kBlocksAtOnce = 2, kHeldSteps = 0, kMostBuffers = 2;
};
template <>
struct ForwardTiles<96, 96> : ForwardTiles<128, 128> {
  static constexpr int kMostBuffers = 1;
};
template <>
struct ForwardTiles<192, 192> {
  static constexpr int kWarps = 4, kWarpRows = 16, kTileKey = 64, kBlocksAtOnce = 2, kHeldSteps = 4, kMostBuffers = 1;
};
template <>
struct ForwardTiles<192, 128> : ForwardTiles<192, 192> {};
template <>
struct ForwardTiles<256, 256> : ForwardTiles<192, 192> {};

// kReadsPages: from ForwardParams::pages, by kernels of their own, with MaskKind::kMasked.
template <class Element_, int kDimQk_, int kDimV_, MaskKind kMask_, int kBuffers_, bool kHasSoftcap_ = false,
          RowLayout kLayout = RowLayout::kAligned, bool kReadsPages_ = false>
struct ForwardConfig : ForwardTiles<kDimQk_, kDimV_> {
  using Tiles = ForwardTiles<kDimQk_, kDimV_>;
  using Element = Element_;
  static constexpr MaskKind kMask = kMask_;
  static constexpr bool kHasSoftcap = kHasSoftcap_, kReadsPages = kReadsPages_;
  static constexpr int kBuffers = kBuffers_;
  static constexpr int kDimQk = kDimQk_, kDimV = kDimV_;
  static constexpr int kThreads = Tiles::kWarps * kWarpSize, kTileQuery = Tiles::kWarps * Tiles::kWarpRows;
  static constexpr int kRowGroups = Tiles::kWarpRows / 16;  // of 16 rows, in a warp

  using Query = OperandTile<kTileQuery, kDimQk, kLayout>;
  using Key = OperandTile<Tiles::kTileKey, kDimQk, kLayout>;
  using Value = OperandTile<Tiles::kTileKey, kDimV, kLayout>;
  using Out = OperandTile<kTileQuery, kDimV, kLayout>;  // leaves through the memory of Q

  struct SharedStorage {
    alignas(128) unsigned char q[Query::kBytes];
    alignas(128) unsigned char k[kBuffers][Key::kBytes];
    alignas(128) unsigned char v[kBuffers][Value::kBytes];
    Interval rows[kTileQuery];  // the keys of each row (MaskKind::kMasked)
  };
  static_assert(!kReadsPages || (kMask == MaskKind::kMasked && kLayout == RowLayout::kAligned));
  static_assert(sizeof(SharedStorage) <= 99 * 1024);
  static_assert(Out::kBytes <= Query::kBytes && kDimQk % 16 == 0 && kDimV % 16 == 0);
};

}  // namespace selfattn::cuda::sm80
