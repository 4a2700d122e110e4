#include "cpu/pair_table.h"

#include <algorithm>
#include <limits>

namespace selfattn::cpu {
namespace {

/// Consecutive keys of one id.
struct Run {
  int32_t id, first, end;
};

/// The runs of ids that are not negative.
std::vector<Run> find_runs(const int32_t* ids, int64_t length) {
  std::vector<Run> runs;
  for (int64_t first = 0, end; first < length; first = end) {
    end = first + 1;
    while (end < length && ids[end] == ids[first]) ++end;
    if (ids[first] >= 0) runs.push_back({ids[first], static_cast<int32_t>(first), static_cast<int32_t>(end)});
  }
  return runs;
}

bool is_ascending(const std::vector<Run>& runs) {
  return std::adjacent_find(runs.begin(), runs.end(), [](const Run& a, const Run& b) { return a.id >= b.id; }) ==
         runs.end();
}

/// The part of [first, end) that causality and window leave to a token: [token + shift - left, token + shift + right].
void limit_by_position(const PairRules& rules, int32_t* first_key, int32_t* end_key) {
  const int64_t shift = rules.key_length - rules.query_length;
  const int64_t unbounded = std::numeric_limits<int64_t>::max() / 4;
  const int64_t left = rules.window_left < 0 ? unbounded : std::min(rules.window_left, unbounded);
  int64_t right = rules.window_right < 0 ? unbounded : std::min(rules.window_right, unbounded);
  if (rules.is_causal) right = 0;
  for (int64_t token = 0; token < rules.query_length; ++token) {
    const int64_t first = std::max<int64_t>(first_key[token], token + shift - left);
    const int64_t end = std::min<int64_t>(end_key[token], token + shift + right + 1);
    first_key[token] = static_cast<int32_t>(first < end ? first : 0);
    end_key[token] = static_cast<int32_t>(first < end ? end : 0);
  }
}

/// The interval of each query token's document among ascending runs; nothing for padding and absent ids.
void limit_to_runs(const std::vector<Run>& runs, const int32_t* query_ids, int64_t length, int32_t* first_key,
                   int32_t* end_key) {
  auto run = runs.begin();
  for (int64_t token = 0; token < length; ++token) {
    const int32_t id = query_ids[token];
    if (run == runs.end() || run->id != id) {
      run = std::lower_bound(runs.begin(), runs.end(), id, [](const Run& a, int32_t b) { return a.id < b; });
    }
    const bool is_found = run != runs.end() && run->id == id;
    first_key[token] = is_found ? run->first : 0;
    end_key[token] = is_found ? run->end : 0;
  }
}

void append_key_block_ids(const int32_t* ids, int64_t length, std::vector<KeyBlockIds>& key_block_ids) {
  for (int64_t first = 0; first < length; first += kPanel) {
    KeyBlockIds block;
    for (int64_t token = first; token < std::min(first + kPanel, length); ++token) {
      if (ids[token] < 0) {
        block.has_padding = true;
        continue;
      }
      block.min_id = std::min(block.min_id, ids[token]);
      block.max_id = std::max(block.max_id, ids[token]);
    }
    key_block_ids.push_back(block);
  }
}

QueryTile make_tile(const PairRules& rules, const PairTable& table, int64_t batch, int64_t first_row, int64_t rows) {
  QueryTile tile{.batch = static_cast<int32_t>(batch),
                 .first_row = static_cast<int32_t>(first_row),
                 .rows = static_cast<int32_t>(rows)};
  for (int64_t token = first_row / rules.group; token * rules.group < first_row + rows; ++token) {
    const int64_t index = batch * rules.query_length + token;
    const int32_t first = table.first_key[index], end = table.end_key[index];
    tile.common_first_key = std::max(tile.common_first_key, first);
    tile.common_end_key = std::min(tile.common_end_key, end);
    if (first >= end) continue;
    tile.first_key = std::min(tile.first_key, first);
    tile.end_key = std::max(tile.end_key, end);
    if (!rules.query_ids) continue;
    tile.min_id = std::min(tile.min_id, rules.query_ids[index]);
    tile.max_id = std::max(tile.max_id, rules.query_ids[index]);
  }
  if (tile.is_empty()) tile.first_key = tile.end_key = 0;
  return tile;
}

}  // namespace

bool PairTable::may_meet(const QueryTile& tile, int64_t block) const {
  if (block * kPanel >= tile.end_key || (block + 1) * kPanel <= tile.first_key) return false;
  if (!compares_ids[tile.batch]) return true;
  const KeyBlockIds& ids = key_block_ids[tile.batch * blocks + block];
  return ids.min_id <= tile.max_id && tile.min_id <= ids.max_id;
}

bool PairTable::is_full(const QueryTile& tile, int64_t first, int64_t end) const {
  if (first < tile.common_first_key || end > tile.common_end_key) return false;
  if (!compares_ids[tile.batch]) return true;
  for (int64_t block = first / kPanel; block * kPanel < end; ++block) {
    const KeyBlockIds& ids = key_block_ids[tile.batch * blocks + block];
    if (ids.has_padding || ids.min_id != tile.max_id || ids.max_id != tile.min_id) return false;
  }
  return true;
}

PairTable make_pair_table(const PairRules& rules) {
  PairTable table;
  table.first_key.assign(rules.batch * rules.query_length, 0);
  table.end_key.assign(rules.batch * rules.query_length, static_cast<int32_t>(rules.key_length));
  table.compares_ids.assign(rules.batch, false);
  const int64_t rows = rules.query_length * rules.group;
  table.tiles = (rows + kTileRows - 1) / kTileRows;
  table.blocks = (rules.key_length + kPanel - 1) / kPanel;
  for (int64_t batch = 0; batch < rules.batch; ++batch) {
    int32_t* first_key = table.first_key.data() + batch * rules.query_length;
    int32_t* end_key = table.end_key.data() + batch * rules.query_length;
    if (rules.query_ids) {
      const int32_t* query_ids = rules.query_ids + batch * rules.query_length;
      const int32_t* key_ids = rules.key_ids + batch * rules.key_length;
      const auto runs = find_runs(key_ids, rules.key_length);
      if (is_ascending(runs)) {
        limit_to_runs(runs, query_ids, rules.query_length, first_key, end_key);
      } else {
        table.compares_ids[batch] = true;
        for (int64_t token = 0; token < rules.query_length; ++token) {
          if (query_ids[token] < 0) end_key[token] = 0;
        }
      }
      append_key_block_ids(key_ids, rules.key_length, table.key_block_ids);
    }
    limit_by_position(rules, first_key, end_key);
    for (int64_t first = 0; first < rows; first += kTileRows) {
      table.query_tiles.push_back(make_tile(rules, table, batch, first, std::min(kTileRows, rows - first)));
    }
  }
  return table;
}

}  // namespace selfattn::cpu
