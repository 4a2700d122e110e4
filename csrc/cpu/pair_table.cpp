#include "cpu/pair_table.h"

#include <algorithm>
#include <limits>
#include <utility>

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

/// Puts runs in the order of their ids. Whether each id has one run, as documents have: none comes back after others.
bool sort_by_distinct_id(std::vector<Run>& runs) {
  const auto has_lower_id = [](const Run& a, const Run& b) { return a.id < b.id; };
  if (!std::is_sorted(runs.begin(), runs.end(), has_lower_id)) std::sort(runs.begin(), runs.end(), has_lower_id);
  return std::adjacent_find(runs.begin(), runs.end(), [](const Run& a, const Run& b) { return a.id == b.id; }) ==
         runs.end();
}

/// How far to its left and right causality and window let a query look.
struct Reach {
  int64_t left, right;

  explicit Reach(const PairRules& rules) {
    const int64_t unbounded = std::numeric_limits<int64_t>::max() / 4;
    left = rules.window_left < 0 ? unbounded : std::min(rules.window_left, unbounded);
    right = rules.window_right < 0 ? unbounded : std::min(rules.window_right, unbounded);
    if (rules.is_causal) right = 0;
  }
};

/// The part of [first, end) that causality and window leave to a token: [token + shift - left, token + shift + right].
void limit_by_index(const PairRules& rules, int32_t* first_key, int32_t* end_key) {
  const int64_t shift = rules.key_length - rules.query_length;
  const auto [left, right] = Reach(rules);
  for (int64_t token = 0; token < rules.query_length; ++token) {
    const int64_t first = std::max<int64_t>(first_key[token], token + shift - left);
    const int64_t end = std::min<int64_t>(end_key[token], token + shift + right + 1);
    first_key[token] = static_cast<int32_t>(first < end ? first : 0);
    end_key[token] = static_cast<int32_t>(first < end ? end : 0);
  }
}

/// [position - left, position + right] of each query token, as far as int32 goes.
void find_position_ranges(const PairRules& rules, const int32_t* query_positions, int32_t* first_position,
                          int32_t* last_position) {
  const auto [left, right] = Reach(rules);
  for (int64_t token = 0; token < rules.query_length; ++token) {
    const int64_t position = query_positions[token];
    first_position[token] = static_cast<int32_t>(std::max<int64_t>(position - left, kMinPosition));
    last_position[token] = static_cast<int32_t>(std::min<int64_t>(position + right, kMaxPosition));
  }
}

/// Whether the keys of every run stand in the order of their positions.
bool are_in_order(const std::vector<Run>& runs, const int32_t* key_positions) {
  return std::all_of(runs.begin(), runs.end(), [&](const Run& run) {
    return std::is_sorted(key_positions + run.first, key_positions + run.end);
  });
}

/// The part of [first, end), whose keys stand in the order of their positions, that lies in a token's range.
void limit_by_position(int64_t length, const int32_t* first_position, const int32_t* last_position,
                       const int32_t* key_positions, int32_t* first_key, int32_t* end_key) {
  for (int64_t token = 0; token < length; ++token) {
    const int32_t *begin = key_positions + first_key[token], *end = key_positions + end_key[token];
    if (begin >= end) continue;
    const int32_t* first = std::lower_bound(begin, end, first_position[token]);
    const int32_t* last = std::upper_bound(first, end, last_position[token]);
    first_key[token] = first < last ? static_cast<int32_t>(first - key_positions) : 0;
    end_key[token] = first < last ? static_cast<int32_t>(last - key_positions) : 0;
  }
}

/// `ids`: of the keys, null where there are none.
void append_key_block_positions(const int32_t* positions, const int32_t* ids, int64_t length,
                                std::vector<KeyBlockPositions>& key_block_positions) {
  for (int64_t first = 0; first < length; first += kPanel) {
    KeyBlockPositions block;
    for (int64_t token = first; token < std::min(first + kPanel, length); ++token) {
      if (ids && ids[token] < 0) continue;
      block.min = std::min(block.min, positions[token]);
      block.max = std::max(block.max, positions[token]);
    }
    key_block_positions.push_back(block);
  }
}

/// The interval of each query token's document among runs in the order of their ids; nothing for padding and absent
/// ids.
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

/// What causality and window leave of a batch entry's intervals, by positions: parts of them where the keys of each
/// stand in the order of their positions, else ranges to compare with. `intervals`: of keys, in each of which a query's
/// lies whole.
void limit_to_positions(const PairRules& rules, int64_t batch, const std::vector<Run>& intervals, PairTable& table) {
  const int64_t first_query = batch * rules.query_length;
  const int32_t* key_positions = rules.key_positions + batch * rules.key_length;
  int32_t *first_position = table.first_position.data() + first_query,
          *last_position = table.last_position.data() + first_query;
  find_position_ranges(rules, rules.query_positions + first_query, first_position, last_position);
  if (are_in_order(intervals, key_positions)) {
    limit_by_position(rules.query_length, first_position, last_position, key_positions,
                      table.first_key.data() + first_query, table.end_key.data() + first_query);
  } else {
    table.compares_positions[batch] = true;
  }
  append_key_block_positions(key_positions, rules.key_ids ? rules.key_ids + batch * rules.key_length : nullptr,
                             rules.key_length, table.key_block_positions);
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
    if (rules.query_positions) {
      tile.common_first_position = std::max(tile.common_first_position, table.first_position[index]);
      tile.common_last_position = std::min(tile.common_last_position, table.last_position[index]);
    }
    if (first >= end) continue;
    tile.first_key = std::min(tile.first_key, first);
    tile.end_key = std::max(tile.end_key, end);
    if (rules.query_positions) {
      tile.first_position = std::min(tile.first_position, table.first_position[index]);
      tile.last_position = std::max(tile.last_position, table.last_position[index]);
    }
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
  if (!key_block_ids.empty()) {  // of documents in another order than the queries', the interval holds others, too
    const KeyBlockIds& ids = key_block_ids[tile.batch * blocks + block];
    if (ids.min_id > tile.max_id || tile.min_id > ids.max_id) return false;
  }
  if (compares_positions[tile.batch]) {
    const KeyBlockPositions& positions = key_block_positions[tile.batch * blocks + block];
    if (positions.min > tile.last_position || tile.first_position > positions.max) return false;
  }
  return true;
}

bool PairTable::is_full(const QueryTile& tile, int64_t first, int64_t end) const {
  if (first < tile.common_first_key || end > tile.common_end_key) return false;
  const bool has_ids = compares_ids[tile.batch], has_positions = compares_positions[tile.batch];
  if (!has_ids && !has_positions) return true;
  for (int64_t block = first / kPanel; block * kPanel < end; ++block) {
    if (has_ids) {
      const KeyBlockIds& ids = key_block_ids[tile.batch * blocks + block];
      if (ids.has_padding || ids.min_id != tile.max_id || ids.max_id != tile.min_id) return false;
    }
    if (has_positions) {
      const KeyBlockPositions& positions = key_block_positions[tile.batch * blocks + block];
      if (positions.min < tile.common_first_position || positions.max > tile.common_last_position) return false;
    }
  }
  return true;
}

PairTable make_pair_table(const PairRules& rules) {
  PairTable table;
  table.first_key.assign(rules.batch * rules.query_length, 0);
  table.end_key.assign(rules.batch * rules.query_length, static_cast<int32_t>(rules.key_length));
  table.compares_ids.assign(rules.batch, false);
  table.compares_positions.assign(rules.batch, false);
  if (rules.query_positions) {
    table.first_position.resize(rules.batch * rules.query_length);
    table.last_position.resize(rules.batch * rules.query_length);
  }
  const int64_t rows = rules.query_length * rules.group;
  table.tiles = (rows + kTileRows - 1) / kTileRows;
  table.blocks = (rules.key_length + kPanel - 1) / kPanel;
  for (int64_t batch = 0; batch < rules.batch; ++batch) {
    int32_t* first_key = table.first_key.data() + batch * rules.query_length;
    int32_t* end_key = table.end_key.data() + batch * rules.query_length;
    std::vector<Run> intervals{{0, 0, static_cast<int32_t>(rules.key_length)}};  // in one of which a query's lies
    if (rules.query_ids) {
      const int32_t* query_ids = rules.query_ids + batch * rules.query_length;
      const int32_t* key_ids = rules.key_ids + batch * rules.key_length;
      auto runs = find_runs(key_ids, rules.key_length);
      if (sort_by_distinct_id(runs)) {
        limit_to_runs(runs, query_ids, rules.query_length, first_key, end_key);
        intervals = std::move(runs);
      } else {
        table.compares_ids[batch] = true;
        for (int64_t token = 0; token < rules.query_length; ++token) {
          if (query_ids[token] < 0) end_key[token] = 0;
        }
      }
      append_key_block_ids(key_ids, rules.key_length, table.key_block_ids);
    }
    if (rules.query_positions) {
      limit_to_positions(rules, batch, intervals, table);
    } else {
      limit_by_index(rules, first_key, end_key);
    }
    for (int64_t first = 0; first < rows; first += kTileRows) {
      table.query_tiles.push_back(make_tile(rules, table, batch, first, std::min(kTileRows, rows - first)));
    }
  }
  return table;
}

}  // namespace selfattn::cpu
