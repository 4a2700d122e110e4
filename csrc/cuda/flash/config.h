// Everything static about the forward kernel: tiles, stages, registers, shared memory, barriers.
#pragma once
#include <cstdint>

#include "tensor_map.h"

namespace selfattn::cuda {

// What the mask may cut off. The narrower kinds save the others' bookkeeping.
enum class MaskKind {
  kFull,    // nothing but the end of the keys
  kCausal,  // keys right of the diagonal
  kMasked,  // windows and segments
};

constexpr int kWarpSize = 32, kWarpgroupSize = 128;
constexpr int kWarpgroupRows = 64;  // M of a wgmma
constexpr int kElementBytes = 2, kPanelRowBytes = kPanelColumns * kElementBytes;

// The choices for one pair of head dimensions, found by measurement (docs/kernels/forward.md).
template <int kDimQk, int kDimV>
struct ForwardPlan;

template <>
struct ForwardPlan<64, 64> {
  static constexpr int kWarpgroups = 3;  // consumer warpgroups, 64 query rows each
  static constexpr int kTileKey = 128;
  static constexpr int kQueryStages = 2, kKeyStages = 4, kValueStages = 4;
  static constexpr int kProducerRegisters = 32, kConsumerRegisters = 160;
  static constexpr bool kQueryInRegisters = false;  // S = Q K^T with Q fragments held in registers
  // Warpgroups multiply in turn: in the kernels without windows and segments, and in the one with them.
  static constexpr bool kTakesTurnsDense = true, kTakesTurnsMasked = true;
  static constexpr int kEarlySixteenths = 8;  // of the exponentials, those before the wait for P V
};

template <>
struct ForwardPlan<96, 96> {
  static constexpr int kWarpgroups = 2, kTileKey = 128;
  static constexpr int kQueryStages = 2, kKeyStages = 2, kValueStages = 3;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr bool kQueryInRegisters = true, kTakesTurnsDense = false, kTakesTurnsMasked = true;
  static constexpr int kEarlySixteenths = 5;
};

template <>
struct ForwardPlan<128, 128> : ForwardPlan<96, 96> {};

template <>
struct ForwardPlan<192, 128> {
  static constexpr int kWarpgroups = 2, kTileKey = 128;
  static constexpr int kQueryStages = 1, kKeyStages = 2, kValueStages = 2;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr bool kQueryInRegisters = false, kTakesTurnsDense = false, kTakesTurnsMasked = false;
  static constexpr int kEarlySixteenths = 8;
};

template <>
struct ForwardPlan<192, 192> : ForwardPlan<192, 128> {
  static constexpr int kTileKey = 112;
};

template <>
struct ForwardPlan<256, 256> : ForwardPlan<192, 128> {
  static constexpr int kTileKey = 80;
};

template <class Element_, int kDimQk_, int kDimV_, MaskKind kMask_>
struct ForwardConfig : ForwardPlan<kDimQk_, kDimV_> {
  using Plan = ForwardPlan<kDimQk_, kDimV_>;
  using Element = Element_;
  static constexpr MaskKind kMask = kMask_;
  static constexpr int kDimQk = kDimQk_, kDimV = kDimV_;
  static constexpr bool kTakesTurns = kMask == MaskKind::kMasked ? Plan::kTakesTurnsMasked : Plan::kTakesTurnsDense;
  static constexpr int kTileQuery = Plan::kWarpgroups * kWarpgroupRows;
  static constexpr int kThreads = (Plan::kWarpgroups + 1) * kWarpgroupSize;
  static constexpr int kConsumerWarps = Plan::kWarpgroups * 4;
  // Named barriers of the repair, for the consumers and for all threads; those of the warpgroups' turns come before.
  static constexpr int kRepairBarrier = Plan::kWarpgroups + 1, kPassBarrier = Plan::kWarpgroups + 2;
  // The first S of a tile is multiplied together with the last P V of the tile before: needs the next Q in time.
  static constexpr bool kOverlapsTiles = Plan::kQueryStages > 1;

  static constexpr int kPanelsQk = (kDimQk + kPanelColumns - 1) / kPanelColumns;
  static constexpr int kPanelsV = (kDimV + kPanelColumns - 1) / kPanelColumns;
  static constexpr int kQueryPanelBytes = kWarpgroupRows * kPanelRowBytes;
  static constexpr int kQueryWarpgroupBytes = kPanelsQk * kQueryPanelBytes;  // one warpgroup's rows: [panel][64][64]
  static constexpr int kQueryBytes = Plan::kWarpgroups * kQueryWarpgroupBytes;
  static constexpr int kKeyPanelBytes = Plan::kTileKey * kPanelRowBytes;
  static constexpr int kKeyBytes = kPanelsQk * kKeyPanelBytes, kValueBytes = kPanelsV * kKeyPanelBytes;

  // Shared memory, from a 1024-byte boundary on.
  static constexpr int kKeyOffset = Plan::kQueryStages * kQueryBytes;
  static constexpr int kValueOffset = kKeyOffset + Plan::kKeyStages * kKeyBytes;
  static constexpr int kRowTableOffset = kValueOffset + Plan::kValueStages * kValueBytes;
  static constexpr int kRowTableBytes = kMask == MaskKind::kMasked ? kTileQuery * 4 : 0;  // one int a query row
  static constexpr int kBarrierOffset = kRowTableOffset + 2 * Plan::kQueryStages * kRowTableBytes;
  static constexpr int kSharedBytes = kBarrierOffset + 512;  // barriers, tiles, messages (forward_shared.cuh)

  static_assert(kDimQk % 32 == 0 && kDimV % 32 == 0, "whole steps of wgmma and of matrix stores");
  static_assert(kPanelsV <= kPanelsQk, "O leaves through the buffer of Q");
  static_assert(Plan::kTileKey % 8 == 0 && Plan::kTileKey <= 128, "a row's mask is 32 bits a lane");
  static_assert(kSharedBytes <= 227 * 1024);
  static_assert(kWarpgroupSize * (Plan::kProducerRegisters + Plan::kWarpgroups * Plan::kConsumerRegisters) <=
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

}  // namespace selfattn::cuda
