#pragma once

#include <cstdint>
#include <limits>
#include <vector>

namespace selfattn::cpu {

constexpr int64_t kTileRows = 64;  // query rows of a tile, at most
constexpr int64_t kPanel = 64;     // columns of a packed panel; tokens of a key block
constexpr int32_t kMaxIndex = std::numeric_limits<int32_t>::max(), kNoId = -1;
constexpr int32_t kMinPosition = std::numeric_limits<int32_t>::min(),
                  kMaxPosition = std::numeric_limits<int32_t>::max();

/// The rules that say which pairs are allowed. Ids are null where there are none, and so are positions, whose place
/// the tokens' indices take, aligned at the last ones.
struct PairRules {
  int64_t batch, query_length, key_length;
  int64_t group;  // query heads that share a key head
  bool is_causal;
  int64_t window_left, window_right;  // -1: unbounded
  const int32_t* query_ids;           // (B, Sq)
  const int32_t* key_ids;             // (B, Skv)
  const int32_t* query_positions;     // (B, Sq)
  const int32_t* key_positions;       // (B, Skv)
};

/// Some consecutive query rows of one batch entry, and what they may attend to, summed up. The heads of a group are
/// rows beside each other: row = token * group + head in the group.
struct QueryTile {
  int32_t batch;
  int32_t first_row, rows;
  int32_t first_key = kMaxIndex,
          end_key = 0;  // the keys that some row may attend to lie in here; equal where there are none
  // The keys in here every row may attend to, its id and position permitting.
  int32_t common_first_key = 0, common_end_key = kMaxIndex;
  int32_t min_id = kMaxIndex, max_id = kNoId;  // of the rows
  // Where positions are compared, those of the keys that some row may attend to, and that every row may attend to.
  int32_t first_position = kMaxPosition, last_position = kMinPosition;
  int32_t common_first_position = kMinPosition, common_last_position = kMaxPosition;

  bool is_empty() const { return first_key >= end_key; }
};

/// The ids of a key block.
struct KeyBlockIds {
  int32_t min_id = kMaxIndex, max_id = kNoId;  // without padding; min_id > max_id where there is nothing else
  bool has_padding = false;
};

/// The positions of a key block's keys, padding left out.
struct KeyBlockPositions {
  int32_t min = kMaxPosition, max = kMinPosition;  // min > max where there is nothing but padding
};

/// The allowed pairs, from O(S) facts: a query token may attend to the keys [first_key, end_key), and, where its batch
/// entry compares ids, only to those of its own id, and where it compares positions, only to those whose position is
/// from first_position to last_position. Documents that are contiguous become intervals and compare nothing, and so do
/// keys in the order of their positions: all of them where ids are compared, those of each document elsewhere.
///
/// No member is inline: one that was compiled for a larger instruction set could become the one copy that all callers
/// use.
struct PairTable {
  std::vector<int32_t> first_key, end_key;  // (B, Sq)
  std::vector<char> compares_ids;           // (B,)
  std::vector<char> compares_positions;     // (B,)
  std::vector<KeyBlockIds> key_block_ids;   // (B, blocks) where there are ids
  std::vector<QueryTile> query_tiles;       // (B, tiles)
  int64_t tiles = 0, blocks = 0;            // query tiles and key blocks of a batch entry
  // Where there are positions:
  std::vector<int32_t> first_position, last_position;  // (B, Sq)
  std::vector<KeyBlockPositions> key_block_positions;  // (B, blocks)

  /// Whether some pair of the tile and the key block may be allowed.
  bool may_meet(const QueryTile& tile, int64_t block) const;
  /// Whether every pair of the tile's rows and the keys [first, end) is allowed.
  bool is_full(const QueryTile& tile, int64_t first, int64_t end) const;
};

PairTable make_pair_table(const PairRules& rules);

}  // namespace selfattn::cpu
