// The single pass: a thread block a key tile, with K and V in shared memory, walks over the blocks of queries that see
// it, of one query head of the group after another. Five products: dK and dV are summed in registers, dQ in float32 in
// global memory (dq_accumulator.cuh), so the order of its terms differs from call to call.
//
//   dQ += dS K of the block before | S^T = K Q^T, P^T | dP^T = V dO^T, dS^T | dV += P^T dO | dK += dS^T Q
//
// Keys are rows, so that P^T and dS^T are left operands as they come (transposed_scores.cuh). The warps that have the
// same keys, a team, divide the queries of S and dP among themselves, and the columns of dK and dV; each needs P and dS
// of the others, through shared memory, behind a barrier of the team. dS has two buffers, as dQ takes it from all warps
// a block later. So a block has one barrier of all warps: its dS is there, its Q and dO have been read, and the next
// are there.
//
// What is out of the ordinary (row_stats.cuh) must be right at once, for what has been added to dQ stays there:
//   rows of queries with large logits, or with a statistic that is not finite: the block's statistics tell. Their
//   exponents are taken with care, and their rows of Q and dO are cleared behind S and dP.
//   rows of K and V that are not finite: the tile is looked at once. K is cleared for dQ, block by block, and then
//   loaded again; dS is 0 where P is.
#pragma once
#include <type_traits>

#include "dq_accumulator.cuh"
#include "params.cuh"
#include "products.cuh"
#include "ptx/barrier.cuh"
#include "ptx/register.cuh"
#include "transposed_scores.cuh"

namespace selfattn::cuda::sm80 {

// The steps first .. first + kSteps - 1 of 16 columns that a warp has of an operand: bytes from the start of the tile,
// `place` being that of step 0.
template <class Tile, int kSteps>
struct ColumnSteps {
  static constexpr bool kIsPowerOfTwo = (kSteps & (kSteps - 1)) == 0;
  uint32_t place;
  int first;

  __device__ __forceinline__ ColumnSteps(uint32_t step_0, int first_step)
      : place(kIsPowerOfTwo ? Tile::at_step(step_0, first_step) : step_0), first(first_step) {
    ptx::keep(place);
  }
  // s_tile: moved by a multiple of kStepBytes.
  __device__ __forceinline__ uint32_t at(uint32_t s_tile, int step) const {
    return Tile::at_step(s_tile + place, kIsPowerOfTwo ? step : first + step);
  }
};

template <class Config>
struct SinglePass {
  using Element = typename Config::Element;
  using Query = typename Config::Query;
  using GradOut = typename Config::GradOut;
  using Key = typename Config::Key;
  using Value = typename Config::Value;
  using Score = typename Config::Score;
  using Storage = typename Config::SharedStorage;
  static constexpr int kTileQuery = Config::kTileQuery, kThreads = Config::kThreads;
  // A warp's share: kGroups groups of 16 keys; kColumns queries of S and dP; of dK and dV so many steps of 16 columns.
  static constexpr int kGroups = Config::kWarpKeys / 16, kTeam = Config::kTeamWarps, kColumns = Config::kWarpQueries;
  static constexpr int kQuerySteps = kColumns / 16;
  static constexpr int kGradKeySteps = Config::kDimQk / kTeam / 16, kGradValueSteps = Config::kDimV / kTeam / 16;
  using Scores = float[kGroups][kColumns / 2];
  using PackedScores = uint32_t[kGroups][kColumns / 4];

  using Dq = DqAccumulator<Config>;

  const BackwardKernelParams& p;
  const BackwardParams& call;
  const KeyTile& tile;
  Storage& s;
  int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int team = warp / kTeam, member = warp % kTeam;
  int warp_row = team * Config::kWarpKeys, warp_column = member * kColumns;

  // Where this lane reads and writes the operands of its warp, from the starts of their tiles. Kept in registers: made
  // anew for each product they would cost as much as its products.
  uint32_t key_left = Key::left_place(0, warp_row), query_right = Query::right_place(0) + warp_column * kPanelRowBytes;
  uint32_t score_left = Score::at_step(Score::left_place(0, warp_row), member* kQuerySteps),
           score_store = Score::at_step(Score::store_place(0, warp_row), member* kQuerySteps);
  ColumnSteps<Query, kGradKeySteps> grad_key_steps{Query::left_place(0, 0), member * kGradKeySteps};
  ColumnSteps<GradOut, kGradValueSteps> grad_value_steps{GradOut::left_place(0, 0), member * kGradValueSteps};
  ColumnSteps<Score, Dq::kGroups> score_steps{Score::right_place(0), Dq::warp_row() / 16};
  ColumnSteps<Key, Dq::kSteps> grad_query_steps{Key::left_place(0, 0), Dq::column_warp() * Dq::kSteps};

  __device__ __forceinline__ SinglePass(const BackwardKernelParams& params, const KeyTile& key_tile, Storage& storage)
      : p(params), call(params.call), tile(key_tile), s(storage) {
    ptx::keep(key_left), ptx::keep(query_right), ptx::keep(score_left), ptx::keep(score_store);
  }

  __device__ __forceinline__ int first_key() const { return tile.index * Config::kTileKey; }
  __device__ __forceinline__ int query_head(const QueryBlock& block) const {
    return tile.kv_head * p.group_size + block.head;
  }
  __device__ __forceinline__ void load_keys() const {
    Key::template load<kThreads>(ptx::shared_address(s.k),
                                 {head_of(call.k, tile.batch, tile.kv_head), call.k.stride_token, call.shape.dim_qk},
                                 first_key(), call.shape.key_length);
  }
  __device__ __forceinline__ void load_values() const {
    Value::template load<kThreads>(ptx::shared_address(s.v),
                                   {head_of(call.v, tile.batch, tile.kv_head), call.v.stride_token, call.shape.dim_v},
                                   first_key(), call.shape.key_length);
  }
  // Of the head whose queries are loaded.
  using QuerySource = typename Query::template Source<kThreads>;
  using GradOutSource = typename GradOut::template Source<kThreads>;
  struct HeadSources {
    int head;
    const uint16_t *g_q, *g_grad_out;  // this thread's chunks of the first row
  };
  __device__ __forceinline__ HeadSources sources_of(const QueryBlock& block) const {
    const int head = query_head(block);
    return {
        block.head, head_of(call.q, tile.batch, head) + QuerySource::offset(call.q.stride_token, call.shape.dim_qk),
        head_of(call.grad_out, tile.batch, head) + GradOutSource::offset(call.grad_out.stride_token, call.shape.dim_v)};
  }

  // Q and dO with the statistics of their rows.
  __device__ __forceinline__ void load_queries(HeadSources& sources, const QueryBlock& block, int buffer) const {
    const AttentionShape& shape = call.shape;
    const int first = block.index * kTileQuery;
    if (block.head != sources.head) sources = sources_of(block);
    QuerySource q(call.q.stride_token, shape.dim_qk);
    GradOutSource grad_out(call.grad_out.stride_token, shape.dim_v);
    q.g_chunk = sources.g_q, grad_out.g_chunk = sources.g_grad_out;
    Query::load(ptx::shared_address(s.q[buffer]), q, first, shape.query_length);
    GradOut::load(ptx::shared_address(s.grad_out[buffer]), grad_out, first, shape.query_length);
    constexpr int kWords = kChunkBytes / 4, kChunks = kTileQuery / kWords;
    if (threadIdx.x >= 2 * kChunks) return;
    const bool is_delta = threadIdx.x >= kChunks;
    const int column = threadIdx.x % kChunks * kWords;
    const float* g_stats = (is_delta ? p.delta : p.lse_log2) +
                           (int64_t(tile.batch) * shape.num_heads + query_head(block)) * p.stat_pitch + first + column;
    ptx::copy_async(ptx::shared_address((is_delta ? s.delta : s.lse_log2)[buffer] + column), g_stats, true);
  }

  // Whether a row of the block is out of the ordinary; the same for all warps.
  __device__ __forceinline__ bool has_exceptional_rows(int buffer) const {
    static_assert(kTileQuery == 2 * kWarpSize);
    const float2 stats = *reinterpret_cast<const float2*>(s.lse_log2[buffer] + 2 * lane);
    return __any_sync(~0u, !(fabsf(stats.x) < kExactFrom) || !(fabsf(stats.y) < kExactFrom));
  }

  // What a warp's rectangle of S in a block wants.
  struct Rectangle {
    bool is_needed, is_plain;  // no pair is masked, and no row out of the ordinary
    bool is_cut, is_exceptional;
  };
  __device__ __forceinline__ Rectangle look_at(const QueryBlock& block, const WarpReach& reach, int buffer,
                                               bool is_always_careful) const {
    const int first_query = block.index * kTileQuery + warp_column;
    Rectangle rectangle;
    rectangle.is_needed = reach.meets(first_query, kColumns);
    rectangle.is_cut = !reach.covers(first_query, kColumns);
    rectangle.is_exceptional = has_exceptional_rows(buffer);
    rectangle.is_plain =
        rectangle.is_needed && !rectangle.is_cut && !block.by_ids && !rectangle.is_exceptional && !is_always_careful;
    return rectangle;
  }

  // The warp's rows of `left` by its rows of `right`.
  template <class Left, class Right>
  __device__ __forceinline__ void multiply(Scores& products, const unsigned char* s_left,
                                           const unsigned char* s_right) const {
    multiply_rows<Element, Left, Right>(products, ptx::shared_address(s_left) + key_left,
                                        ptx::shared_address(s_right) + query_right);
  }

  // Of the lane's first column.
  __device__ __forceinline__ int column() const { return warp_column + 2 * (lane % 4); }
  __device__ __forceinline__ auto lse_of(const QueryBlock& block) const {
    const int64_t head = int64_t(tile.batch) * call.shape.num_heads + query_head(block);
    const float* g_lse = call.lse + head * call.shape.query_length + block.index * kTileQuery + column();
    return [g_lse](int i) { return g_lse[i]; };
  }
  __device__ __forceinline__ void mask(Scores& scores, const QueryBlock& block, bool is_cut) const {
    mask_keys(scores, call, tile, first_key() + warp_row + lane / 4, block.index * kTileQuery + column(), is_cut,
              block.by_ids);
  }

  // Scores become P, whose masked pairs are 0: behind the statistics, which may be NaN.
  __device__ __forceinline__ void take_weights(Scores& scores, const QueryBlock& block, int buffer,
                                               const Rectangle& rectangle) const {
    const float* s_lse_log2 = s.lse_log2[buffer] + column();
    if (rectangle.is_exceptional)
      take_exponents<true>(scores, s_lse_log2, call.scale, lse_of(block));
    else
      take_exponents<false>(scores, s_lse_log2, call.scale, lse_of(block));
    mask(scores, block, rectangle.is_cut);
    exponentiate(scores);
  }

  __device__ __forceinline__ void take_capped_weights(Scores& scores, PackedScores& packed, const QueryBlock& block,
                                                      int buffer, const Rectangle& rectangle) const {
    const float* s_lse_log2 = s.lse_log2[buffer] + column();
#pragma unroll
    for (int g = 0; g < kGroups; g++) p.softcap.apply(scores[g]);
    if (rectangle.is_exceptional)
      sm80::take_capped_weights<Element, true>(scores, packed, s_lse_log2, p.softcap.cap, lse_of(block));
    else
      sm80::take_capped_weights<Element, false>(scores, packed, s_lse_log2, p.softcap.cap, lse_of(block));
    if (!rectangle.is_cut && !block.by_ids) return;
    mask(scores, block, rectangle.is_cut);
#pragma unroll
    for (int g = 0; g < kGroups; g++) clear_masked(scores[g], packed[g]);
  }

  // The warp's rectangle of P or dS, to shared memory.
  __device__ __forceinline__ void store_scores(unsigned char* s_scores, const PackedScores& packed) const {
#pragma unroll
    for (int g = 0; g < kGroups; g++)
#pragma unroll
      for (int step = 0; step < kQuerySteps; step++)
        Score::store_left(ptx::shared_address(s_scores) + score_store + g * kStepBytes, step, packed[g] + 4 * step);
  }

  // sum += scores right over 16 queries: the warp's keys, and its columns of `right`.
  template <class Right, int kSteps>
  __device__ __forceinline__ void accumulate_step(float (&sum)[kGroups][kSteps * 8],
                                                  const uint32_t* const (&a)[kGroups], uint32_t s_right,
                                                  const ColumnSteps<Right, kSteps>& columns) const {
#pragma unroll
    for (int pair = 0; pair < kSteps; pair++) {
      uint32_t b[4];
      ptx::load_matrix_x4_transposed(columns.at(s_right, pair), b);
#pragma unroll
      for (int g = 0; g < kGroups; g++) {
        ptx::multiply<Element>(sum[g] + 8 * pair, a[g], b[0], b[1]);
        ptx::multiply<Element>(sum[g] + 8 * pair + 4, a[g], b[2], b[3]);
      }
    }
  }
  // Over the queries whose scores the warp has itself.
  template <class Right, int kSteps>
  __device__ __forceinline__ void accumulate_own(float (&sum)[kGroups][kSteps * 8], const PackedScores& packed,
                                                 const unsigned char* s_right,
                                                 const ColumnSteps<Right, kSteps>& columns) const {
    const uint32_t rows = ptx::shared_address(s_right) + warp_column * kPanelRowBytes;
#pragma unroll
    for (int step = 0; step < kQuerySteps; step++) {
      const uint32_t* a[kGroups];
#pragma unroll
      for (int g = 0; g < kGroups; g++) a[g] = packed[g] + 4 * step;
      accumulate_step(sum, a, rows + step * kStepBytes, columns);
    }
  }
  // Over those of the others of the team.
  template <class Right, int kSteps>
  __device__ __forceinline__ void accumulate_others(float (&sum)[kGroups][kSteps * 8], const unsigned char* s_scores,
                                                    const unsigned char* s_right,
                                                    const ColumnSteps<Right, kSteps>& columns) const {
#pragma unroll
    for (int other = 1; other < kTeam; other++) {
      const uint32_t rows = ptx::shared_address(s_right) + (warp_column ^ other * kColumns) * kPanelRowBytes;
#pragma unroll
      for (int step = 0; step < kQuerySteps; step++) {
        uint32_t loaded[kGroups][4];
        const uint32_t* a[kGroups];
#pragma unroll
        for (int g = 0; g < kGroups; g++) {
          Score::load_left(ptx::shared_address(s_scores) + score_left + g * kStepBytes, other * kQuerySteps + step,
                           loaded[g]);
          a[g] = loaded[g];
        }
        accumulate_step(sum, a, rows + step * kStepBytes, columns);
      }
    }
  }
  __device__ __forceinline__ void wait_for_team() const {
    if constexpr (kTeam > 1) ptx::barrier_sync(1 + team, kTeam * kWarpSize);
  }

  // dQ of a block whose dS is in `buffer`, to its accumulator.
  __device__ __forceinline__ void add_query_gradients(float* g_sums, int buffer) const {
    float dq[Dq::kGroups][Dq::kSteps * 8];
    const uint32_t s_scores = ptx::shared_address(s.grad_scores[buffer]), s_k = ptx::shared_address(s.k);
#pragma unroll
    for (int step = 0; step < Config::kTileKey / 16; step++) {
      uint32_t a[Dq::kGroups][4];
#pragma unroll
      for (int g = 0; g < Dq::kGroups; g++)
        ptx::load_matrix_x4_transposed(score_steps.at(s_scores, g) + step * kStepBytes, a[g]);
#pragma unroll
      for (int pair = 0; pair < Dq::kSteps; pair++) {
        uint32_t b[4];
        ptx::load_matrix_x4_transposed(grad_query_steps.at(s_k, pair) + step * kStepBytes, b);
#pragma unroll
        for (int g = 0; g < Dq::kGroups; g++) {
          if (step == 0) {
            ptx::multiply_overwrite<Element>(dq[g] + 8 * pair, a[g], b[0], b[1]);
            ptx::multiply_overwrite<Element>(dq[g] + 8 * pair + 4, a[g], b[2], b[3]);
          } else {
            ptx::multiply<Element>(dq[g] + 8 * pair, a[g], b[0], b[1]);
            ptx::multiply<Element>(dq[g] + 8 * pair + 4, a[g], b[2], b[3]);
          }
        }
      }
    }
    Dq::add(g_sums, dq);
  }

  // Whether the tile has a row that is not finite. By all threads of the thread block.
  template <class Tile>
  __device__ __forceinline__ bool has_non_finite_rows(const unsigned char* s_tile) const {
    ptx::FiniteTest<Element> finite;
#pragma unroll 4
    for (int number = threadIdx.x; number < Tile::kRows * Tile::kChunks; number += kThreads) {
      const uint4 chunk =
          *reinterpret_cast<const uint4*>(s_tile + Tile::place(number / Tile::kChunks, number % Tile::kChunks));
      finite.add(chunk.x), finite.add(chunk.y), finite.add(chunk.z), finite.add(chunk.w);
    }
    return !finite.all_finite();
  }

  // Rows of Q and dO without a finite statistic. By all warps.
  static __device__ __noinline__ void clear_exceptional_queries(Storage& s, int buffer) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
    for (int row = threadIdx.x / kWarpSize; row < kTileQuery; row += Config::kWarps) {
      if (is_finite(s.lse_log2[buffer][row])) continue;
#pragma unroll 1
      for (int chunk = lane; chunk < Query::kChunks; chunk += kWarpSize)
        *reinterpret_cast<uint4*>(s.q[buffer] + Query::place(row, chunk)) = uint4{};
#pragma unroll 1
      for (int chunk = lane; chunk < GradOut::kChunks; chunk += kWarpSize)
        *reinterpret_cast<uint4*>(s.grad_out[buffer] + GradOut::place(row, chunk)) = uint4{};
    }
  }

  // The warp's rectangle of a sum times factor, rounded, to a tile in shared memory.
  template <class Tile, int kSteps>
  __device__ __forceinline__ void store_sum(unsigned char* s_tile, const float (&sum)[kGroups][kSteps * 8],
                                            float factor) const {
#pragma unroll
    for (int g = 0; g < kGroups; g++)
#pragma unroll
      for (int r = 0; r < 2; r++)
#pragma unroll
        for (int group = 0; group < 2 * kSteps; group++)
          *reinterpret_cast<uint32_t*>(s_tile +
                                       Tile::place(warp_row + 16 * g + 8 * r + lane / 4, member * 2 * kSteps + group) +
                                       4 * (lane % 4)) =
              ptx::pack<Element>(sum[g][4 * group + 2 * r] * factor, sum[g][4 * group + 2 * r + 1] * factor);
  }

  __device__ __forceinline__ void run() const {
    const AttentionShape& shape = call.shape;
    QueryBlockWalk walk(tile.blocks, p.group_size, tile.segments.has_ids, true);
    const auto test = [&](int index, bool& meets, bool& is_uniform) {
      compare_ids<Config>(call.segments, tile, index, meets, is_uniform);
    };
    QueryBlock block{0, 0, false}, next{0, 0, false};
    bool has_block = walk.find_next(block, test);
    HeadSources sources = sources_of(block);
    load_keys(), load_values();
    if (has_block) load_queries(sources, block, 0);
    ptx::commit_copies();
    float grad_k[kGroups][kGradKeySteps * 8], grad_v[kGroups][kGradValueSteps * 8];
    clear(grad_k), clear(grad_v);
    ptx::wait_for_copies<0>();
    __syncthreads();
    const bool has_bad_keys = __syncthreads_or(has_non_finite_rows<Key>(s.k)),
               has_bad_values = __syncthreads_or(has_non_finite_rows<Value>(s.v));
    const auto queries_of = [&](int key) {
      return visible_queries(call, tile.batch, tile.segments.has_runs, min(first_key() + key, shape.key_length - 1));
    };
    WarpReach reach(queries_of(warp_row), queries_of(warp_row + Config::kWarpKeys - 1));
    if (first_key() + warp_row >= shape.key_length) reach.by_some = {0, 0};
    if (first_key() + warp_row + Config::kWarpKeys > shape.key_length) reach.by_all = {0, 0};  // the end is masked
    // dQ of the block before.
    const auto dq_of = [&](const QueryBlock& block) {
      return Dq::of_lane(
          Dq::tile_of(p, (tile.batch - p.first_batch) * shape.num_heads + query_head(block), block.index));
    };
    float* g_dq = dq_of(block);
    bool has_previous = false;
    bool has_next = has_block && walk.find_next(next, test);
    int buffer = 0;
    Scores weights, dp;
    PackedScores packed_weights, score_gradients;
#pragma unroll 1
    for (; has_block; buffer ^= 1) {
      const Rectangle rectangle = look_at(block, reach, buffer, has_bad_values || has_bad_keys);
      // The two warps of a scheduler are at different work: one has dQ first, the other behind dS.
      const bool is_dq_first = !Config::kStaggersDq || has_bad_keys || warp < Config::kWarps / 2;
      if (has_previous && is_dq_first) {
        if (has_bad_keys) [[unlikely]] {
          clear_non_finite_rows<Element, Key, Config::kWarps>(s.k, 0, Config::kTileKey);
          __syncthreads();
        }
        add_query_gradients(g_dq, buffer ^ 1);
        if (has_bad_keys) [[unlikely]] {
          __syncthreads();  // K has been read
          load_keys();
          ptx::commit_copies();
          ptx::wait_for_copies<0>();
          __syncthreads();
        }
      }
      if (has_next) load_queries(sources, next, buffer ^ 1);
      ptx::commit_copies();
      const float *s_lse_log2 = s.lse_log2[buffer] + column(), *s_delta = s.delta[buffer] + column();
      unsigned char *s_weights = s.weights_of(buffer), *s_grad_scores = s.grad_scores[buffer];
      const auto sum_own = [&](auto is_careful) {
        if (kTeam > 1) store_scores(s_weights, packed_weights);
        accumulate_own(grad_v, packed_weights, s.grad_out[buffer], grad_value_steps);
        if (rectangle.is_needed) take_score_gradients<is_careful.value>(weights, dp, s_delta);
        pack_left<Element>(weights, score_gradients);
        if (!Config::kSharesScores) store_scores(s_grad_scores, score_gradients);
        if (Config::kStaggersDq && has_previous && !is_dq_first) add_query_gradients(g_dq, buffer ^ 1);
        if (!Config::kSharesScores) accumulate_own(grad_k, score_gradients, s.q[buffer], grad_key_steps);
      };
      if (rectangle.is_plain && !Config::kHasSoftcap) {  // without a branch, so that exponentials and products mix
        multiply<Key, Query>(weights, s.k, s.q[buffer]);
        take_exponents<false>(weights, s_lse_log2, call.scale, lse_of(block));
        exponentiate(weights);
        pack_left<Element>(weights, packed_weights);
        multiply<Value, GradOut>(dp, s.v, s.grad_out[buffer]);
        sum_own(std::false_type{});
      } else {
        if (rectangle.is_needed) {
          multiply<Key, Query>(weights, s.k, s.q[buffer]);
          if constexpr (Config::kHasSoftcap) {
            take_capped_weights(weights, packed_weights, block, buffer, rectangle);
          } else {
            take_weights(weights, block, buffer, rectangle);
            pack_left<Element>(weights, packed_weights);
          }
          multiply<Value, GradOut>(dp, s.v, s.grad_out[buffer]);
        } else {
          clear(weights);
          pack_left<Element>(weights, packed_weights);
        }
        if (rectangle.is_exceptional) [[unlikely]] {
          __syncthreads();  // S and dP have been multiplied
          clear_exceptional_queries(s, buffer);
          __syncthreads();
        }
        sum_own(std::true_type{});
      }
      wait_for_team();  // P is there, and dS unless it waits for the place of P
      accumulate_others(grad_v, s_weights, s.grad_out[buffer], grad_value_steps);
      if constexpr (Config::kSharesScores) {
        wait_for_team();  // P has been read
        store_scores(s_grad_scores, score_gradients);
        accumulate_own(grad_k, score_gradients, s.q[buffer], grad_key_steps);
        wait_for_team();  // dS is there
      }
      accumulate_others(grad_k, s_grad_scores, s.q[buffer], grad_key_steps);
      g_dq = dq_of(block), has_previous = true;
      block = next, has_block = has_next;
      has_next = has_block && walk.find_next(next, test);
      ptx::wait_for_copies<0>();
      __syncthreads();  // dS and the next block are there, and this one has been read
    }
    if (has_bad_keys) [[unlikely]] {
      clear_non_finite_rows<Element, Key, Config::kWarps>(s.k, 0, Config::kTileKey);
      __syncthreads();
    }
    if (has_previous) add_query_gradients(g_dq, buffer ^ 1);
    __syncthreads();  // K has been read

    store_sum<Key, kGradKeySteps>(s.k, grad_k, call.scale);
    store_sum<Value, kGradValueSteps>(s.v, grad_v, 1.f);
    __syncthreads();
    store_tile<Key, kThreads>(s.k, head_of(call.grad_k, tile.batch, tile.kv_head), call.grad_k.stride_token,
                              first_key(), shape.key_length, shape.dim_qk);
    store_tile<Value, kThreads>(s.v, head_of(call.grad_v, tile.batch, tile.kv_head), call.grad_v.stride_token,
                                first_key(), shape.key_length, shape.dim_v);
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksAtOnce)
    flash_attention_backward_kernel(const __grid_constant__ BackwardKernelParams p) {
  extern __shared__ __align__(128) unsigned char s_memory[];
  auto& s = *reinterpret_cast<typename Config::SharedStorage*>(s_memory);
  const KeyTile tile = describe_key_tile<Config>(p);
  SinglePass<Config>(p, tile, s).run();
}

}  // namespace selfattn::cuda::sm80
