// Everything static about the forward kernel: tiles, stages, registers, shared memory, barriers.
#pragma once
#include <cstdint>

#include "flash/sm90/repair_list.cuh"
#include "flash/tensor_map.h"
#include "flash/tile/constants.h"
#include "flash/tile/window.h"

namespace selfattn::cuda::sm90 {

// What the mask may cut off. The narrower kinds save the others' bookkeeping.
enum class MaskKind {
  kFull,    // nothing but the end of the keys
  kCausal,  // keys right of the diagonal
  kMasked,  // windows and segments
};

constexpr int kWarpgroupSize = 128;
constexpr int kWarpgroupRows = 64;  // M of a wgmma
constexpr int kElementBytes = 2, kPanelRowBytes = kPanelColumns * kElementBytes;

// The choices for one pair of head dimensions, found by measurement (docs/kernels/forward.md).
template <int kDimQk, int kDimV>
struct ForwardTiles;

template <>
struct ForwardTiles<64, 64> {
  static constexpr int kWarpgroups = 3;  // consumer warpgroups, 64 query rows each
  static constexpr int kTileKey = 128;
  static constexpr int kQueryStages = 2, kKeyStages = 4, kValueStages = 4;
  static constexpr int kProducerRegisters = 32, kConsumerRegisters = 160;
  static constexpr bool kQueryInRegisters = false;  // S = Q K^T with Q fragments held in registers
  // Ping-pong: one warpgroup multiplies while another is at its softmax. In the kernels without windows and segments,
  // and in the one with them.
  static constexpr bool kPingPongDense = true, kPingPongMasked = true;
  static constexpr int kEarlySixteenths = 8;  // of the exponentials, those before the wait for P V
};

template <>
struct ForwardTiles<96, 96> {
  static constexpr int kWarpgroups = 2, kTileKey = 128;
  static constexpr int kQueryStages = 2, kKeyStages = 2, kValueStages = 3;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr bool kQueryInRegisters = true, kPingPongDense = false, kPingPongMasked = true;
  static constexpr int kEarlySixteenths = 5;
};

template <>
struct ForwardTiles<128, 128> : ForwardTiles<96, 96> {};

template <>
struct ForwardTiles<192, 128> {
  static constexpr int kWarpgroups = 2, kTileKey = 128;
  static constexpr int kQueryStages = 1, kKeyStages = 2, kValueStages = 2;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr bool kQueryInRegisters = false, kPingPongDense = false, kPingPongMasked = false;
  static constexpr int kEarlySixteenths = 8;
};

template <>
struct ForwardTiles<192, 192> : ForwardTiles<192, 128> {
  static constexpr int kTileKey = 112;
};

template <>
struct ForwardTiles<256, 256> : ForwardTiles<192, 128> {
  static constexpr int kTileKey = 80;
};

// Beside the values of SegmentMode: the keys of a tile are limited by the window alone.
constexpr int kNoSegments = -1;

// What the producer warp tells the others about a tile; index -1 ends the work.
struct QueryTile {
  int index, head;
  int first_block, end_block;
  int mode;  // SegmentMode or kNoSegments
};

// Where keys and values lie in pages, a key block comes in boxes: some neighbouring slots of one page, of one head.
struct PageBox {
  int page, first_slot, kv_head;
};

// What the producer warp knows of the tile in work there, beside its QueryTile.
struct PagedTile {
  Interval keys;  // in reach
  int batch, query_head, kv_head;
};

// kReadsPages: from ForwardParams::pages, by kernels of their own, with MaskKind::kMasked.
template <class Element_, int kDimQk_, int kDimV_, MaskKind kMask_, bool kHasSoftcap_ = false,
          bool kReadsPages_ = false>
struct ForwardConfig : ForwardTiles<kDimQk_, kDimV_> {
  using Tiles = ForwardTiles<kDimQk_, kDimV_>;
  using Element = Element_;
  static constexpr MaskKind kMask = kMask_;
  static constexpr bool kHasSoftcap = kHasSoftcap_, kReadsPages = kReadsPages_;
  static constexpr int kDimQk = kDimQk_, kDimV = kDimV_;
  static constexpr bool kPingPong = kMask == MaskKind::kMasked ? Tiles::kPingPongMasked : Tiles::kPingPongDense;
  static constexpr int kTileQuery = Tiles::kWarpgroups * kWarpgroupRows;
  static constexpr int kThreads = (Tiles::kWarpgroups + 1) * kWarpgroupSize;
  static constexpr int kConsumerWarps = Tiles::kWarpgroups * 4;
  // Barrier 0 is __syncthreads.
  enum NamedBarrier : int {
    kPingPongBarrier = 1,                                    // of consumer warpgroup 0; those of the others follow
    kRepairBarrier = kPingPongBarrier + Tiles::kWarpgroups,  // the consumers, in the repair
    kPassBarrier,                                            // all threads, between the passes
  };
  // The first S of a tile is multiplied together with the last P V of the tile before: needs the next Q in time.
  static constexpr bool kOverlapsTiles = Tiles::kQueryStages > 1;

  static constexpr int kPanelsQk = (kDimQk + kPanelColumns - 1) / kPanelColumns;
  static constexpr int kPanelsV = (kDimV + kPanelColumns - 1) / kPanelColumns;
  static constexpr int kQueryPanelBytes = kWarpgroupRows * kPanelRowBytes;
  static constexpr int kQueryWarpgroupBytes = kPanelsQk * kQueryPanelBytes;  // one warpgroup's rows: [panel][64][64]
  static constexpr int kQueryBytes = Tiles::kWarpgroups * kQueryWarpgroupBytes;
  static constexpr int kKeyPanelBytes = Tiles::kTileKey * kPanelRowBytes;
  static constexpr int kKeyBytes = kPanelsQk * kKeyPanelBytes, kValueBytes = kPanelsV * kKeyPanelBytes;

  // One int a query row, where tiles may be masked by segments.
  static constexpr int kTableRows = kMask == MaskKind::kMasked ? kTileQuery : 0, kTableBytes = kTableRows * 4;

  static constexpr int kMostBoxes = kReadsPages ? Tiles::kTileKey / kCachePageMultiple : 1;
  static constexpr int kBoxStages = kReadsPages ? 4 : 1;  // key blocks whose boxes are known

  struct SharedStorage {
    alignas(1024) unsigned char q[Tiles::kQueryStages][Tiles::kWarpgroups][kQueryWarpgroupBytes];  // and O
    unsigned char k[Tiles::kKeyStages][kKeyBytes];
    unsigned char v[Tiles::kValueStages][kValueBytes];
    // [0]: first key of the row's run, or its id; [1]: end of its run.
    alignas(16) int row_table[Tiles::kQueryStages][2][kTableRows ? kTableRows : 1];
    uint64_t q_full[Tiles::kQueryStages], q_empty[Tiles::kQueryStages];
    uint64_t out_full[Tiles::kQueryStages][Tiles::kWarpgroups];
    uint64_t k_full[Tiles::kKeyStages], k_empty[Tiles::kKeyStages];
    uint64_t v_full[Tiles::kValueStages], v_empty[Tiles::kValueStages];
    QueryTile tile[Tiles::kQueryStages];
    QueryTile upcoming;                    // the producer warp's own
    int block_message[Tiles::kKeyStages];  // KeyBlock, encoded
    RepairList<Tiles::kQueryStages> repair;
    PagedTile paged;  // the producer warp's own
    PageBox boxes[kBoxStages][kMostBoxes];
    uint64_t boxes_full[kBoxStages], boxes_empty[kBoxStages];
  };

  static_assert(kDimQk % 32 == 0 && kDimV % 32 == 0, "whole steps of wgmma and of matrix stores");
  static_assert(kPanelsV <= kPanelsQk, "O leaves through the buffer of Q");
  static_assert(!kReadsPages || (kMask == MaskKind::kMasked && Tiles::kTileKey % kCachePageMultiple == 0));
  static_assert(Tiles::kTileKey % 8 == 0 && Tiles::kTileKey <= 128, "a row's mask is 32 bits a lane");
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
  static_assert(kWarpgroupSize * (Tiles::kProducerRegisters + Tiles::kWarpgroups * Tiles::kConsumerRegisters) <=
                64 * 1024);
};

}  // namespace selfattn::cuda::sm90
