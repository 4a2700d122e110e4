// Everything static about the backward kernels: tiles, warps, shared memory. All tiles fit the 99 KB that a thread
// block may have on every card from 8.0 on.
#pragma once
#include "flash/sm80/operand.cuh"

namespace selfattn::cuda::sm80 {

constexpr int kMaxSharedBytes = 99 * 1024;

// Rows of a block of queries in the tables of segments. Blocks of keys are those of the kernel for dK and dV.
constexpr int kQueryBlock = 64;

// The rows of the workspace are filled up to whole tiles of any kernel.
constexpr int kStatRows = 128;

// Of the kernel for dQ: a thread block has kWarps * kWarpRows queries and walks over blocks of kTileKey keys.
template <int kDimQk, int kDimV>
struct DqTiles;

template <>
struct DqTiles<64, 64> {
  static constexpr int kWarps = 4, kWarpRows = 32, kTileKey = 64, kBlocksAtOnce = 2;
};
template <>
struct DqTiles<96, 96> {
  static constexpr int kWarps = 8, kWarpRows = 16, kTileKey = 64, kBlocksAtOnce = 1;
};
template <>
struct DqTiles<128, 128> : DqTiles<96, 96> {};
template <>
struct DqTiles<192, 128> {
  static constexpr int kWarps = 4, kWarpRows = 16, kTileKey = 64, kBlocksAtOnce = 1;
};
template <>
struct DqTiles<192, 192> : DqTiles<192, 128> {};
template <>
struct DqTiles<256, 256> {
  static constexpr int kWarps = 4, kWarpRows = 16, kTileKey = 32, kBlocksAtOnce = 1;
};

// Of the kernel for dK and dV: a thread block has kWarps * kWarpRows keys and walks over blocks of kTileQuery queries,
// kQueriesAtOnce of which are multiplied before their weights become operands. Where the registers do not hold both
// sums (kSumsTogether false) it walks twice, for dK and then for dV.
template <int kDimQk, int kDimV>
struct DkdvTiles;

template <>
struct DkdvTiles<64, 64> {
  static constexpr int kWarps = 4, kWarpRows = 32, kTileQuery = 64, kQueriesAtOnce = 32, kBlocksAtOnce = 2;
  static constexpr bool kSumsTogether = true;
};
template <>
struct DkdvTiles<96, 96> {
  static constexpr int kWarps = 8, kWarpRows = 16, kTileQuery = 64, kQueriesAtOnce = 64, kBlocksAtOnce = 1;
  static constexpr bool kSumsTogether = true;
};
template <>
struct DkdvTiles<128, 128> : DkdvTiles<96, 96> {};
template <>
struct DkdvTiles<192, 128> {
  static constexpr int kWarps = 4, kWarpRows = 16, kTileQuery = 64, kQueriesAtOnce = 32, kBlocksAtOnce = 1;
  static constexpr bool kSumsTogether = true;
};
template <>
struct DkdvTiles<192, 192> {
  static constexpr int kWarps = 4, kWarpRows = 16, kTileQuery = 64, kQueriesAtOnce = 64, kBlocksAtOnce = 1;
  static constexpr bool kSumsTogether = false;
};
template <>
struct DkdvTiles<256, 256> {
  static constexpr int kWarps = 4, kWarpRows = 16, kTileQuery = 32, kQueriesAtOnce = 32, kBlocksAtOnce = 1;
  static constexpr bool kSumsTogether = false;
};

// Of the single pass: a thread block has kTileKey keys and walks over blocks of 64 queries. kWarpKeys keys have a team
// of warps, which share the 64 queries in S and dP and the columns of dK and dV. Of dQ a warp has 64 / kDqRowWarps
// queries and its share of the columns.
//   kSharesScores: P has the memory of dS, until dS is there. It makes room for all of it in 163 KB.
//   kStaggersDq: half of the warps multiply dQ at another place in the step.
template <int kDimQk, int kDimV>
struct SinglePassTiles {
  static constexpr int kWarps = 8, kWarpKeys = 32, kTileKey = 128, kDqRowWarps = 2, kBlocksAtOnce = 1;
  static constexpr bool kSharesScores = true, kStaggersDq = true;
};
template <>
struct SinglePassTiles<64, 64> {
  static constexpr int kWarps = 4, kWarpKeys = 32, kTileKey = 64, kDqRowWarps = 2, kBlocksAtOnce = 2;
  static constexpr bool kSharesScores = false, kStaggersDq = true;
};
template <>
struct SinglePassTiles<96, 96> : SinglePassTiles<128, 128> {
  static constexpr int kDqRowWarps = 4;
};
template <>
struct SinglePassTiles<192, 192> : SinglePassTiles<128, 128> {
  static constexpr int kTileKey = 64;
};
template <>
struct SinglePassTiles<192, 128> : SinglePassTiles<192, 192> {
  static constexpr bool kSharesScores = false;
};
template <>
struct SinglePassTiles<256, 256> : SinglePassTiles<192, 192> {
  static constexpr bool kSharesScores = false, kStaggersDq = false;
};

// Rows of the tiles of either kernel, for what is prepared ahead of them.
template <int kDimQk, int kDimV>
struct BackwardTileRows {
  using Queries = DqTiles<kDimQk, kDimV>;
  using Keys = DkdvTiles<kDimQk, kDimV>;
  static constexpr int kOfDq = Queries::kWarps * Queries::kWarpRows, kOfDkdv = Keys::kWarps * Keys::kWarpRows;
  static_assert(kOfDq % kQueryBlock == 0 && kStatRows % kOfDq == 0 && kStatRows % kQueryBlock == 0);
  static_assert(kOfDkdv % Queries::kTileKey == 0, "a block of keys lies in one block of the tables");
  static_assert(kQueryBlock % Keys::kTileQuery == 0, "a block of queries, too");
  static_assert(kOfDkdv % SinglePassTiles<kDimQk, kDimV>::kTileKey == 0, "either form may take a call");
};

template <class Element_, int kDimQk_, int kDimV_, bool kHasSoftcap_ = false, RowLayout kLayout_ = RowLayout::kAligned>
struct DqConfig : DqTiles<kDimQk_, kDimV_> {
  using Tiles = DqTiles<kDimQk_, kDimV_>;
  using Element = Element_;
  static constexpr bool kHasSoftcap = kHasSoftcap_;
  static constexpr RowLayout kLayout = kLayout_;
  static constexpr int kDimQk = kDimQk_, kDimV = kDimV_;
  static constexpr int kThreads = Tiles::kWarps * kWarpSize, kTileQuery = Tiles::kWarps * Tiles::kWarpRows;
  static constexpr int kRowGroups = Tiles::kWarpRows / 16;                      // of 16 rows, in a warp
  static constexpr int kKeyBlock = BackwardTileRows<kDimQk_, kDimV_>::kOfDkdv;  // in the tables of segments

  using Query = OperandTile<kTileQuery, kDimQk, kLayout>;  // dQ leaves through its memory
  using GradOut = OperandTile<kTileQuery, kDimV, kLayout>;
  using Key = OperandTile<Tiles::kTileKey, kDimQk, kLayout>;
  using Value = OperandTile<Tiles::kTileKey, kDimV, kLayout>;

  struct SharedStorage {
    alignas(128) unsigned char q[Query::kBytes];
    alignas(128) unsigned char grad_out[GradOut::kBytes];
    alignas(128) unsigned char k[Key::kBytes];
    alignas(128) unsigned char v[Value::kBytes];
  };
  static_assert(sizeof(SharedStorage) <= kMaxSharedBytes);
  static_assert(kDimQk % 16 == 0 && kDimV % 16 == 0 && Tiles::kTileKey % 16 == 0 && Tiles::kWarpRows % 16 == 0);
};

template <class Element_, int kDimQk_, int kDimV_, bool kHasSoftcap_ = false, RowLayout kLayout_ = RowLayout::kAligned>
struct DkdvConfig : DkdvTiles<kDimQk_, kDimV_> {
  using Tiles = DkdvTiles<kDimQk_, kDimV_>;
  using Element = Element_;
  static constexpr bool kHasSoftcap = kHasSoftcap_;
  static constexpr RowLayout kLayout = kLayout_;
  static constexpr int kDimQk = kDimQk_, kDimV = kDimV_;
  static constexpr int kThreads = Tiles::kWarps * kWarpSize, kTileKey = Tiles::kWarps * Tiles::kWarpRows;
  static constexpr int kKeyBlock = kTileKey;  // in the tables of segments
  static constexpr int kRowGroups = Tiles::kWarpRows / 16;
  static constexpr int kParts = Tiles::kTileQuery / Tiles::kQueriesAtOnce;

  using Key = OperandTile<kTileKey, kDimQk, kLayout>;  // dK leaves through its memory, dV through that of V
  using Value = OperandTile<kTileKey, kDimV, kLayout>;
  using Query = OperandTile<Tiles::kTileQuery, kDimQk, kLayout>;
  using GradOut = OperandTile<Tiles::kTileQuery, kDimV, kLayout>;

  struct SharedStorage {
    alignas(128) unsigned char k[Key::kBytes];
    alignas(128) unsigned char v[Value::kBytes];
    alignas(128) unsigned char q[Query::kBytes];
    alignas(128) unsigned char grad_out[GradOut::kBytes];
    alignas(16) float lse_log2[Tiles::kTileQuery];  // of the queries in q (row_stats.cuh)
    alignas(16) float delta[Tiles::kTileQuery];
  };
  static_assert(sizeof(SharedStorage) <= kMaxSharedBytes);
  static_assert(kDimQk % 16 == 0 && kDimV % 16 == 0 && Tiles::kQueriesAtOnce % 16 == 0 && Tiles::kWarpRows % 16 == 0);
  static_assert(Tiles::kSumsTogether || (kParts == 1 && kDimQk == kDimV),
                "one sum at a time: of whole blocks, dK through the memory of V, as K is wanted for dV");
};

// For aligned rows alone.
template <class Element_, int kDimQk_, int kDimV_, bool kHasSoftcap_ = false>
struct SinglePassConfig : SinglePassTiles<kDimQk_, kDimV_> {
  using Tiles = SinglePassTiles<kDimQk_, kDimV_>;
  using Element = Element_;
  static constexpr bool kHasSoftcap = kHasSoftcap_;
  static constexpr int kDimQk = kDimQk_, kDimV = kDimV_;
  static constexpr int kThreads = Tiles::kWarps * kWarpSize, kTileQuery = 64;
  static constexpr int kKeyBlock = BackwardTileRows<kDimQk_, kDimV_>::kOfDkdv;  // in the tables of segments
  static constexpr int kTeams = Tiles::kTileKey / Tiles::kWarpKeys, kTeamWarps = Tiles::kWarps / kTeams;
  static constexpr int kWarpQueries = kTileQuery / kTeamWarps;

  using Key = OperandTile<Tiles::kTileKey, kDimQk>;  // dK leaves through its memory, dV through that of V
  using Value = OperandTile<Tiles::kTileKey, kDimV>;
  using Query = OperandTile<kTileQuery, kDimQk>;
  using GradOut = OperandTile<kTileQuery, kDimV>;
  using Score = OperandTile<Tiles::kTileKey, kTileQuery>;
  static constexpr bool kHasWeights = kTeamWarps > 1 && !Tiles::kSharesScores;

  struct SharedStorage {
    alignas(128) unsigned char k[Key::kBytes];
    alignas(128) unsigned char v[Value::kBytes];
    alignas(128) unsigned char q[2][Query::kBytes];
    alignas(128) unsigned char grad_out[2][GradOut::kBytes];
    alignas(128) unsigned char grad_scores[2][Score::kBytes];
    alignas(128) unsigned char weights[kHasWeights ? Score::kBytes : 1];  // P
    // The statistics of the queries in q (row_stats.cuh).
    alignas(16) float lse_log2[2][kTileQuery];
    alignas(16) float delta[2][kTileQuery];

    // P has a place of its own, or that of dS before dS is there.
    __host__ __device__ unsigned char* weights_of(int buffer) { return kHasWeights ? weights : grad_scores[buffer]; }
  };
  static_assert(kWarpQueries % 16 == 0 && kDimQk % (16 * kTeamWarps) == 0 && kDimV % (16 * kTeamWarps) == 0);
};

}  // namespace selfattn::cuda::sm80
