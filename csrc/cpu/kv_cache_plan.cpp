#include "cpu/kv_cache_plan.h"

#include <ATen/ops/zeros.h>

#include <iterator>
#include <limits>

#include "kv_cache/positions.h"

namespace selfattn::cpu {
namespace {

constexpr int64_t kLeastChunkKeys = 256;
constexpr int64_t kTasksPerThread = 4;

/// Runs, and the queries' tokens, sorted by the row of the cache, in the order of tokens within each.
void sort_queries(const KvCacheProblem& problem, const int64_t* lengths, KvCachePlan& plan) {
  const int64_t batch = problem.query.size(0), length = problem.query.size(1), rows = problem.lengths.size(0);
  const at::Tensor ids = problem.segment_ids ? problem.segment_ids->to(at::kLong).contiguous() : at::Tensor();
  const int64_t* const id_of = ids.defined() ? ids.const_data_ptr<int64_t>() : nullptr;
  // Bin 0: tokens of no row, which have a run without keys.
  const auto bin_of = [&](int64_t token) { return 1 + (id_of ? std::max<int64_t>(id_of[token], -1) : token / length); };
  std::vector<int64_t> next(rows + 2, 0);  // the place of a bin's next query
  for (int64_t token = 0; token < batch * length; ++token) ++next[bin_of(token) + 1];
  for (int64_t bin = 0; bin <= rows; ++bin) {
    const int64_t row = bin - 1, count = next[bin + 1];
    if (count > 0) plan.runs.push_back({std::max<int64_t>(row, 0), row < 0 ? 0 : lengths[row], next[bin], count});
    next[bin + 1] += next[bin];
  }
  plan.queries.resize(batch * length);
  for (int64_t token = 0; token < batch * length; ++token) {
    plan.queries[next[bin_of(token)]++] = {.batch = static_cast<int32_t>(token / length),
                                           .token = static_cast<int32_t>(token % length)};
  }
}

/// The keys that the query at `position` may attend to, in a row of `length` keys, of which a draft mask (or null) says
/// the last `drafts`.
void set_keys(const KvCacheProblem& problem, int64_t position, int64_t length, const bool* draft_mask, int64_t drafts,
              CacheQuery& query) {
  if (position < 0) return;
  const int64_t first = problem.window_left < 0 ? 0 : std::max<int64_t>(position - problem.window_left, 0);
  const int64_t last = problem.window_right < 0 ? length - 1 : std::min(position + problem.window_right, length - 1);
  const int64_t first_draft = draft_mask ? length - drafts : length;
  const int64_t end = std::min({last + 1, first_draft, problem.is_causal ? position + 1 : length});
  if (first < end) query.first_key = first, query.end_key = end;
  for (int64_t i = std::max<int64_t>(-first_draft, 0); draft_mask && i < drafts; ++i) {
    const int64_t key = first_draft + i;
    if (draft_mask[i] && first <= key && key <= last) query.draft_keys |= uint32_t{1} << i;
  }
}

void set_keys(const KvCacheProblem& problem, const int64_t* positions, KvCachePlan& plan) {
  const int64_t drafts = problem.query.size(1);
  const at::Tensor mask = problem.draft_mask ? problem.draft_mask->contiguous() : at::Tensor();
  for (const CacheRun& run : plan.runs) {
    for (int64_t i = run.first_query; i < run.first_query + run.queries; ++i) {
      CacheQuery& query = plan.queries[i];
      const int64_t token = query.batch * drafts + query.token;
      const bool* const of_query = mask.defined() ? mask.const_data_ptr<bool>() + token * drafts : nullptr;
      set_keys(problem, positions[token], run.length, of_query, drafts, query);
    }
  }
}

void set_pages(const KvCacheProblem& problem, KvCachePlan& plan) {
  const int64_t page_size = problem.key.size(1), columns = problem.page_table->size(1);
  const at::Tensor used = at::zeros(problem.page_table->sizes(), problem.page_table->options().dtype(at::kBool));
  for (const CacheRun& run : plan.runs) {
    bool* const row = used.mutable_data_ptr<bool>() + run.cache_row * columns;
    const int64_t first_draft = KvCachePlan::first_draft_key(problem, run);
    for (int64_t i = run.first_query; i < run.first_query + run.queries; ++i) {
      const CacheQuery& query = plan.queries[i];
      if (query.first_key < query.end_key) {
        std::fill(row + query.first_key / page_size, row + (query.end_key - 1) / page_size + 1, true);
      }
      for (int64_t bit = 0; bit < 32; ++bit) {
        if (query.draft_keys >> bit & 1) row[(first_draft + bit) / page_size] = true;
      }
    }
  }
  plan.pages = kv_cache_pages(*problem.page_table, used, problem.pages()).contiguous();
}

/// The keys of a tile from those of its queries.
void bound_keys(const KvCachePlan& plan, int64_t group, int64_t length_of_row, CacheTile& tile) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  tile.first_key = kMost, tile.common_end_key = kMost;
  const int64_t first = tile.first_query + tile.first_row / group;
  const int64_t last = tile.first_query + (tile.first_row + tile.rows - 1) / group;
  for (int64_t i = first; i <= last; ++i) {
    const CacheQuery& query = plan.queries[i];
    if (query.first_key < query.end_key) {
      tile.first_key = std::min(tile.first_key, query.first_key);
      tile.end_key = std::max(tile.end_key, query.end_key);
    }
    if (query.draft_keys) {
      tile.first_key = std::min(tile.first_key, std::max<int64_t>(tile.first_draft_key, 0));
      tile.end_key = length_of_row;
    }
    tile.common_first_key = std::max(tile.common_first_key, query.first_key);
    tile.common_end_key = std::min(tile.common_end_key, query.end_key);
  }
  if (tile.end_key == 0) tile.first_key = 0;
}

}  // namespace

KvCachePlan plan_kv_cache(const KvCacheProblem& problem) {
  // Checks the values of lengths, ids and positions, too.
  const at::Tensor positions = kv_cache_positions(problem.lengths, problem.segment_ids, problem.query_length(),
                                                  problem.capacity(), problem.positions)
                                   .contiguous();
  const at::Tensor lengths = problem.lengths.to(at::kLong).contiguous();
  KvCachePlan plan;
  sort_queries(problem, lengths.const_data_ptr<int64_t>(), plan);
  set_keys(problem, positions.const_data_ptr<int64_t>(), plan);
  if (problem.page_table) set_pages(problem, plan);
  return plan;
}

int64_t KvCachePlan::first_draft_key(const KvCacheProblem& problem, const CacheRun& run) {
  return problem.draft_mask ? run.length - problem.query.size(1) : std::numeric_limits<int64_t>::max();
}

std::vector<CacheRun> KvCachePlan::take_long_runs(const KvCacheProblem& problem, int64_t query_rows) {
  const int64_t group = problem.query.size(2) / problem.key.size(2);
  const auto is_long = [&](const CacheRun& run) {
    return run.queries * group >= query_rows && run.queries <= run.length;
  };
  std::vector<CacheRun> long_runs;
  std::copy_if(runs.begin(), runs.end(), std::back_inserter(long_runs), is_long);
  std::erase_if(runs, is_long);
  return long_runs;
}

void KvCachePlan::make_tiles(const KvCacheProblem& problem, int64_t threads) {
  const int64_t key_heads = problem.key.size(2), group = problem.query.size(2) / key_heads;
  int64_t keys = 0;
  for (const CacheRun& run : runs) {
    const int64_t rows = run.queries * group, first_draft = first_draft_key(problem, run);
    for (int64_t row = 0; row < rows; row += kCacheTileRows) {
      CacheTile tile{.cache_row = run.cache_row,
                     .first_query = run.first_query,
                     .first_row = row,
                     .rows = std::min(rows - row, kCacheTileRows),
                     .first_draft_key = first_draft};
      bound_keys(*this, group, run.length, tile);
      tile_rows = std::max(tile_rows, tile.rows);
      keys += tile.end_key - tile.first_key;
      tiles.push_back(tile);
    }
  }
  const int64_t wanted = threads == 1 ? 1 : kTasksPerThread * threads;
  chunk_keys = problem.split_keys;
  if (chunk_keys == 0) chunk_keys = std::max(round_up((keys + wanted - 1) / wanted, kCacheSpan), kLeastChunkKeys);
  int64_t chunks = 0;
  for (CacheTile& tile : tiles) {
    tile.first_chunk = tile.first_key / chunk_keys;
    tile.chunks = std::max<int64_t>((tile.end_key + chunk_keys - 1) / chunk_keys - tile.first_chunk, 1);
    has_parts |= tile.chunks > 1;
    chunks += tile.chunks;
  }
  // Heads are tasks of their own where there would be too few tasks: read together, their tokens lie side by side.
  const int64_t head_tasks = std::clamp<int64_t>((wanted + chunks - 1) / std::max<int64_t>(chunks, 1), 1, key_heads);
  heads_per_task = (key_heads + head_tasks - 1) / head_tasks;
  for (CacheTile& tile : tiles) {
    tile.first_task = tasks;
    tasks += tile.chunks * ((key_heads + heads_per_task - 1) / heads_per_task);
  }
}

}  // namespace selfattn::cpu
