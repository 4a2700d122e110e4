// selfattn::flash_attention_kv_cache on CUDA: tensors -> params -> launch.
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "binding.h"
#include "flash/kv_cache/chunk_tiles.h"
#include "flash/kv_cache/params.h"
#include "forward.h"
#include "kv_cache/attention_op.h"

namespace selfattn::cuda {
namespace {

int pages_per_row(const KvCacheProblem& problem) {
  return problem.page_table ? static_cast<int>(problem.page_table->size(1)) : 1;
}

int64_t capacity_of(const KvCacheProblem& problem) { return problem.key.size(1) * pages_per_row(problem); }

/// Of `query` (batch rows, queries, NH, DQK), to which all slots of a row are keys.
AttentionShape shape_over_cache(const KvCacheProblem& problem, const at::Tensor& query) {
  AttentionShape shape = shape_of(query, problem.key, problem.value);
  shape.key_length = static_cast<int>(capacity_of(problem));
  return shape;
}

/// Whether forward kernels of the current device can read the cache, and apply all that the call asks for.
bool has_forward_kernel(const KvCacheProblem& problem, bool from_pages) {
  if (problem.positions || problem.draft_mask || problem.split_keys) return false;
  if (const int64_t capacity = capacity_of(problem); capacity == 0 || capacity > kMaxCacheCapacity) return false;
  for (const at::Tensor* cache : {&problem.key, &problem.value})
    if (!has_kernel_layout(*cache, RowLayout::kAligned)) return false;
  return !from_pages || flash_kernels(element_of(problem.query), RowLayout::kAligned).reads_pages;
}

/// The queries of a tile of the forward kernel.
int64_t forward_tile(const KvCacheProblem& problem) {
  ForwardParams params{};
  params.shape = shape_over_cache(problem, problem.query), params.softcap = static_cast<float>(problem.softcap);
  return flash_kernels(element_of(problem.query), RowLayout::kAligned).forward_tiles(params).query;
}

/// Whether the forward kernel ends sooner than the one for few queries, over `rows` rows of so many queries. It has the
/// several times higher speed, but takes whole tiles of a head, and never two thread blocks for one tile: of the rows
/// that the device has room for, in as many waves as it takes, enough must be in use (docs/kernels/decode.md).
bool fills_forward_tiles(const KvCacheProblem& problem, int64_t rows, int64_t queries) {
  constexpr int64_t kSpeed = 3;
  const int64_t tile = forward_tile(problem), heads = rows * problem.query.size(2);
  const int64_t tiles = heads * ((queries + tile - 1) / tile);
  const int64_t sms = at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
  return (tiles + sms - 1) / sms * sms * tile <= kSpeed * heads * queries;
}

/// Whether the forward kernel serves the call, and sooner than the kernel for few queries. Of shapes and layouts alone.
bool takes_forward_kernel(const KvCacheProblem& problem) {
  const at::Tensor& q = problem.query;
  if (problem.segment_ids || q.size(1) < kLeastQueriesOfChunk || q.size(1) > kMaxSegmentLength) return false;
  return has_forward_kernel(problem, problem.page_table.has_value()) &&
         fills_forward_tiles(problem, q.size(0), q.size(1));
}

/// Whether some row of a call with ids may have a chunk of queries, which the forward kernel would take sooner. Which
/// rows do is known on the device alone: where every row could have a query and no chunk be left, none is looked for.
bool may_have_chunks(const KvCacheProblem& problem) {
  if (!problem.segment_ids) return false;
  const int64_t tokens = problem.query.size(0) * problem.query.size(1);
  if (tokens < problem.lengths.size(0) + kLeastQueriesOfChunk || tokens > kMaxSegmentLength) return false;
  return has_forward_kernel(problem, /*from_pages=*/true) && fills_forward_tiles(problem, 1, tokens);
}

/// The forward kernel over batch rows of a cache, to which all slots of a row are keys, and lengths and windows are
/// intervals of them. `pages`: with a table of the batch rows, or without any. `tiles`: CacheRows has it.
AttentionResults run_forward_over_cache(const KvCacheProblem& problem, const at::Tensor& query, const KeyPages& pages,
                                        const CacheTile* tiles) {
  const AttentionWindow window = window_of(problem.is_causal, problem.window_left, problem.window_right);
  const ForwardCall call{.query = query,
                         .key = problem.key,
                         .value = problem.value,
                         .sinks = problem.sinks,
                         .scale = problem.scale,
                         .softcap = problem.softcap,
                         .shape = shape_over_cache(problem, query),
                         .window = {},
                         .pages = pages};
  return run_forward(call, [&](const TileSizes& sizes) {
    SegmentProblem segments{};
    segments.batch = call.shape.batch;
    segments.query_length = call.shape.query_length, segments.key_length = call.shape.key_length;
    segments.query_tile = sizes.query, segments.key_tile = sizes.key;
    segments.window_left = segments.window_right = AttentionWindow::kUnbounded;
    segments.order_of = SegmentSide::kQueries;
    segments.cache = {.lengths = integers_of(problem.lengths),
                      .page_table = pages.table,
                      .page_size = pages.size,
                      .pages = pages.count,
                      .window_left = window.left,
                      .window_right = window.right,
                      .tiles = tiles};
    return segments;
  });
}

KeyPages pages_of(const KvCacheProblem& problem, const IntegerView& table) {
  return {.table = table,
          .pages_per_row = pages_per_row(problem),
          .size = static_cast<int>(problem.key.size(1)),
          .count = static_cast<int>(problem.key.size(0))};
}

/// A chunk of queries of each row.
AttentionResults attend_chunks(const KvCacheProblem& problem) {
  const KeyPages pages = problem.page_table ? pages_of(problem, integers_of(problem.page_table)) : KeyPages{};
  return run_forward_over_cache(problem, problem.query, pages, /*tiles=*/nullptr);
}

/// (NH,) contiguous, in a type that the kernel for few queries reads.
OptionalTensor readable_sinks(const OptionalTensor& sinks) {
  if (!sinks) return sinks;
  return (sinks->scalar_type() == at::kDouble ? sinks->to(at::kFloat) : *sinks).contiguous();
}

/// Few queries of each row, or any that ids, positions or a draft mask name. `ids`: of the call, or of those queries
/// alone that are not left to another kernel, and then rows have few.
AttentionResults attend_rows(const KvCacheProblem& problem, const IntegerView& ids, bool has_short_rows) {
  const at::Tensor &q = problem.query, &k = problem.key, &v = problem.value;
  const cudaStream_t stream = at::cuda::getCurrentCUDAStream();
  const ScaledQuery scaled = with_positive_scale(q, problem.scale);
  const at::Tensor query = with_kernel_layout(scaled.query, RowLayout::kAligned);
  const OptionalTensor sinks = readable_sinks(problem.sinks);
  const OptionalTensor draft_mask =
      problem.draft_mask ? OptionalTensor(problem.draft_mask->contiguous()) : std::nullopt;
  const at::Tensor out = empty({q.size(0), q.size(1), q.size(2), v.size(3)}, q.scalar_type(), q.device());
  const at::Tensor lse = empty({q.size(0), q.size(2), q.size(1)}, at::kFloat, q.device());

  KvCacheParams params{};
  params.batch = static_cast<int>(q.size(0)), params.queries = static_cast<int>(q.size(1));
  params.rows = static_cast<int>(problem.lengths.size(0));
  params.pages = static_cast<int>(k.size(0)), params.page_size = static_cast<int>(k.size(1));
  params.pages_per_row = pages_per_row(problem);
  params.num_heads = static_cast<int>(q.size(2)), params.num_kv_heads = static_cast<int>(k.size(2));
  params.dim_qk = static_cast<int>(q.size(3)), params.dim_v = static_cast<int>(v.size(3));
  params.window = window_of(/*is_causal=*/false, problem.window_left, problem.window_right);
  params.is_causal = problem.is_causal;
  params.element = element_of(q);
  params.scale = scaled.scale, params.softcap = static_cast<float>(problem.softcap);
  params.split_keys = problem.split_keys;
  params.q = view_of(query), params.k = view_of(k), params.v = view_of(v);
  params.out = out.mutable_data_ptr(), params.lse = lse.mutable_data_ptr<float>();
  if (sinks) params.sinks = sinks->const_data_ptr(), params.sink_type = element_of(*sinks);
  params.lengths = integers_of(problem.lengths);
  params.page_table = integers_of(problem.page_table);
  params.segment_ids = ids, params.has_short_rows = has_short_rows;
  params.positions = integers_of(problem.positions);
  params.draft_mask = draft_mask ? draft_mask->const_data_ptr<bool>() : nullptr;
  at::Tensor workspace;
  const auto allocate = [&](int64_t bytes) {
    workspace = empty({bytes}, at::kByte, q.device());
    return workspace.mutable_data_ptr();
  };
  C10_CUDA_CHECK(launch_attend_kv_cache(params, allocate, stream));
  return {out, lse};
}

/// Rows that ids name, some of them perhaps with a chunk of queries: those by the forward kernel, the others as few.
AttentionResults attend_ragged_rows(const KvCacheProblem& problem) {
  const at::Tensor& q = problem.query;
  const cudaStream_t stream = at::cuda::getCurrentCUDAStream();
  const at::Tensor query = with_kernel_layout(q, RowLayout::kAligned);
  ChunkTiles chunks{};
  chunks.batch = static_cast<int>(q.size(0)), chunks.queries = static_cast<int>(q.size(1));
  chunks.rows = static_cast<int>(problem.lengths.size(0));
  chunks.ids = integers_of(problem.segment_ids);
  chunks.lengths = integers_of(problem.lengths), chunks.page_table = integers_of(problem.page_table);
  chunks.num_heads = static_cast<int>(q.size(2));
  chunks.dim_qk = static_cast<int>(q.size(3)), chunks.dim_v = static_cast<int>(problem.value.size(3));
  chunks.q = view_of(query);
  chunks.tile = static_cast<int>(forward_tile(problem));
  chunks.count = static_cast<int>(most_chunk_tiles(q.size(0) * q.size(1), chunks.rows, chunks.tile));
  chunks.pages_per_row = pages_per_row(problem);
  const at::Tensor memory = empty({place_chunk_tiles(chunks, nullptr)}, at::kByte, q.device());
  place_chunk_tiles(chunks, memory.mutable_data_ptr());
  const at::Tensor tiled = empty({chunks.count, chunks.tile, q.size(2), q.size(3)}, q.scalar_type(), q.device());
  chunks.queries_tiled = tiled.mutable_data_ptr();

  C10_CUDA_CHECK(launch_plan_chunk_tiles(chunks, stream));
  C10_CUDA_CHECK(launch_gather_chunk_tiles(chunks, stream));
  const IntegerView table{chunks.pages_tiled, /*is_int64=*/false, chunks.pages_per_row, 1};
  const AttentionResults of_tiles = run_forward_over_cache(problem, tiled, pages_of(problem, table), chunks.tiles);
  const IntegerView rest{chunks.rest_ids, /*is_int64=*/false, chunks.queries, 1};
  AttentionResults results = attend_rows(problem, rest, /*has_short_rows=*/true);
  C10_CUDA_CHECK(launch_scatter_chunk_tiles(
      chunks, std::get<0>(of_tiles).const_data_ptr(), std::get<1>(of_tiles).const_data_ptr<float>(),
      std::get<0>(results).mutable_data_ptr(), std::get<1>(results).mutable_data_ptr<float>(), stream));
  return results;
}

AttentionResults attend(const KvCacheProblem& problem) {
  const c10::cuda::CUDAGuard guard(problem.query.device());
  if (takes_forward_kernel(problem)) return attend_chunks(problem);
  if (may_have_chunks(problem)) return attend_ragged_rows(problem);
  return attend_rows(problem, integers_of(problem.segment_ids), /*has_short_rows=*/false);
}

}  // namespace
}  // namespace selfattn::cuda

TORCH_LIBRARY_IMPL(selfattn, CUDA, m) {
  using namespace selfattn;
  m.impl("flash_attention_kv_cache", TORCH_FN(flash_kv_cache_from_schema<checked<selfattn::cuda::attend>>));
}
