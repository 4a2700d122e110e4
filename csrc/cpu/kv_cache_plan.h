#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "cpu/kv_cache_kernels.h"
#include "kv_cache/problem.h"

namespace selfattn::cpu {

/// The queries of one cache row, in the order of their tokens.
struct CacheRun {
  int64_t cache_row, length;     // and the keys in it
  int64_t first_query, queries;  // of KvCachePlan::queries
};

/// What a call's integers say: which queries go through which row of the cache, and which of its keys each may attend
/// to.
struct KvCachePlan {
  std::vector<CacheQuery> queries;
  std::vector<CacheRun> runs;
  at::Tensor pages;  // (R, pages of a row) int64, 0 where no query may attend to a key; undefined without a table

  std::vector<CacheTile> tiles;
  int64_t tile_rows = 0;                       // of the largest
  int64_t chunk_keys = 0, heads_per_task = 0;  // see KvCacheKernelProblem
  int64_t tasks = 0;
  bool has_parts = false;  // some tile has several chunks

  /// The first key that the draft bits of a run stand for.
  static int64_t first_draft_key(const KvCacheProblem& problem, const CacheRun& run);

  /// Removes the runs of at least so many query rows (queries times heads of a group), all of whose queries stand in
  /// the row.
  std::vector<CacheRun> take_long_runs(const KvCacheProblem& problem, int64_t query_rows);
  /// Cuts the runs into tiles, and their keys into chunks and tasks for the threads.
  void make_tiles(const KvCacheProblem& problem, int64_t threads);
};

/// Queries and runs. Throws c10::ValueError for lengths, ids, positions and pages out of range.
KvCachePlan plan_kv_cache(const KvCacheProblem& problem);

}  // namespace selfattn::cpu
