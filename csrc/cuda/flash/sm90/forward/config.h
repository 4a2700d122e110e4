// Everything static about the forward kernel: tiles, stages, registers, shared memory, barriers.
#pragma once
#include <cstdint>

#include "flash/sm90/tensor_map.h"
#include "flash/tile/constants.h"

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

template <class Element_, int kDimQk_, int kDimV_, MaskKind kMask_>
struct ForwardConfig : ForwardTiles<kDimQk_, kDimV_> {
  using Tiles = ForwardTiles<kDimQk_, kDimV_>;
  using Element = Element_;
  static constexpr MaskKind kMask = kMask_;
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

  // Shared memory, from a 1024-byte boundary on.
  static constexpr int kKeyOffset = Tiles::kQueryStages * kQueryBytes;
  static constexpr int kValueOffset = kKeyOffset + Tiles::kKeyStages * kKeyBytes;
  static constexpr int kRowTableOffset = kValueOffset + Tiles::kValueStages * kValueBytes;
  static constexpr int kRowTableBytes = kMask == MaskKind::kMasked ? kTileQuery * 4 : 0;  // one int a query row
  static constexpr int kBarrierOffset = kRowTableOffset + 2 * Tiles::kQueryStages * kRowTableBytes;
  static constexpr int kSharedBytes = kBarrierOffset + 512;  // barriers, tiles, messages (shared.cuh)

  static_assert(kDimQk % 32 == 0 && kDimV % 32 == 0, "whole steps of wgmma and of matrix stores");
  static_assert(kPanelsV <= kPanelsQk, "O leaves through the buffer of Q");
  static_assert(Tiles::kTileKey % 8 == 0 && Tiles::kTileKey <= 128, "a row's mask is 32 bits a lane");
  static_assert(kSharedBytes <= 227 * 1024);
  static_assert(kWarpgroupSize * (Tiles::kProducerRegisters + Tiles::kWarpgroups * Tiles::kConsumerRegisters) <=
                64 * 1024);
};

// Barriers in shared memory, 8 bytes each; [stage] or [stage][warpgroup].
template <class Config>
struct ForwardBarriers {
  static constexpr int kQ = Config::kQueryStages, kK = Config::kKeyStages, kV = Config::kValueStages;
  static constexpr int kW = Config::kWarpgroups;
  uint32_t base;
  __device__ uint32_t query_full(int stage) const { return base + 8 * stage; }
  __device__ uint32_t query_empty(int stage) const { return base + 8 * (kQ + stage); }
  __device__ uint32_t out_full(int stage, int warpgroup) const { return base + 8 * (2 * kQ + stage * kW + warpgroup); }
  __device__ uint32_t key_full(int stage) const { return base + 8 * (2 * kQ + kQ * kW + stage); }
  __device__ uint32_t key_empty(int stage) const { return base + 8 * (2 * kQ + kQ * kW + kK + stage); }
  __device__ uint32_t value_full(int stage) const { return base + 8 * (2 * kQ + kQ * kW + 2 * kK + stage); }
  __device__ uint32_t value_empty(int stage) const { return base + 8 * (2 * kQ + kQ * kW + 2 * kK + kV + stage); }
  static constexpr int kCount = 2 * kQ + kQ * kW + 2 * kK + 2 * kV, kBytes = 8 * kCount;
};

}  // namespace selfattn::cuda::sm90
