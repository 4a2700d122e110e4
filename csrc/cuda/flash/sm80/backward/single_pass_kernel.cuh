// The single pass: a thread block a key tile, with K and V in shared memory, walks over the blocks of queries that see
// it, of one query head of the group after another. Five products: dK and dV are summed in registers, dQ in float32 in
// global memory (dq_accumulator.cuh), so the order of its terms differs from call to call.
//
//   S = Q K^T, P | dP = dO V^T, dS | P and dS to shared memory | dQ += dS K | dV += P^T dO | dK += dS^T Q
//
// The warps share every product; each has a rectangle of its result (SinglePassTiles). A block has two barriers: P and
// dS are there; all of the block has been read, and the next Q and dO are there.
//
// What is out of the ordinary (row_stats.cuh) must be right at once, for what has been added to dQ stays there:
//   rows of queries with large logits, or with a statistic that is not finite: the block's statistics tell. Their
//   exponents are taken with care, and their rows of Q and dO are cleared behind S and dP.
//   rows of K and V that are not finite: the tile is looked at once. K is cleared for dQ, block by block, and then
//   loaded again; dS is 0 where P is.
#pragma once
#include "dq_accumulator.cuh"
#include "flash/tile/mask.cuh"
#include "key_tile.cuh"
#include "params.cuh"
#include "products.cuh"
#include "ptx/register.cuh"
#include "row_stats.cuh"

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
  __device__ __forceinline__ uint32_t at(const unsigned char* s_tile, int step) const {
    return ptx::shared_address(s_tile) +
           (kIsPowerOfTwo ? Tile::at_step(place, step) : Tile::at_step(place, first + step));
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
  // A warp's rectangles.
  static constexpr int kScoreKeys = Config::kScoreKeys, kScoreGroups = kTileQuery / Config::kScoreRowWarps / 16;
  static constexpr int kKeyGroups = Config::kTileKey / Config::kKeyRowWarps / 16;
  static constexpr int kGradKeySteps = Config::kDimQk / Config::kKeyColumnWarps / 16,
                       kGradValueSteps = Config::kDimV / Config::kKeyColumnWarps / 16;
  using Scores = float[kScoreGroups][kScoreKeys / 2];

  using Dq = DqAccumulator<Config>;

  const BackwardKernelParams& p;
  const BackwardParams& call;
  const KeyTile& tile;
  Storage& s;
  int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int score_row = warp / Config::kScoreKeyWarps * (16 * kScoreGroups),
      score_key = warp % Config::kScoreKeyWarps * kScoreKeys;
  int key_row = warp / Config::kKeyColumnWarps * (16 * kKeyGroups), key_column_warp = warp % Config::kKeyColumnWarps;

  // Where this lane reads and writes the operands of its warp, from the starts of their tiles. Kept in registers: made
  // anew for each product they would cost as much as its products.
  uint32_t score_left = Query::left_place(0, score_row), score_right = Key::right_place(0) + score_key * kPanelRowBytes,
           score_store = Score::place(score_row + lane / 4, score_key / 8) + 4 * (lane % 4),
           grad_query_left = Score::left_place(0, Dq::warp_row());
  ColumnSteps<Score, kKeyGroups> key_steps{Score::right_place(0), key_row / 16};
  ColumnSteps<Query, kGradKeySteps> grad_key_steps{Query::left_place(0, 0), key_column_warp * kGradKeySteps};
  ColumnSteps<GradOut, kGradValueSteps> grad_value_steps{GradOut::left_place(0, 0), key_column_warp * kGradValueSteps};
  ColumnSteps<Key, Dq::kSteps> grad_query_steps{Key::left_place(0, 0), Dq::column_warp() * Dq::kSteps};

  __device__ __forceinline__ SinglePass(const BackwardKernelParams& params, const KeyTile& key_tile, Storage& storage)
      : p(params), call(params.call), tile(key_tile), s(storage) {
    ptx::keep(score_left), ptx::keep(score_right), ptx::keep(score_store), ptx::keep(grad_query_left);
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

  // The keys that the row of a block may see, ids aside.
  __device__ __forceinline__ Interval keys_of(int query) const {
    return visible_keys(call, tile.batch, tile.segments.has_runs, min(query, call.shape.query_length - 1));
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
                                               bool has_bad_values) const {
    constexpr int kRows = 16 * kScoreGroups;
    const int first_query = block.index * kTileQuery + score_row;
    Rectangle rectangle;
    rectangle.is_needed = reach.meets(first_query, kRows);
    rectangle.is_cut = !reach.covers(first_query, kRows);
    rectangle.is_exceptional = has_exceptional_rows(buffer);
    rectangle.is_plain =
        rectangle.is_needed && !rectangle.is_cut && !block.by_ids && !rectangle.is_exceptional && !has_bad_values;
    return rectangle;
  }

  // left right^T of the warp's rows of `left` and its keys.
  template <class Left, class Right>
  __device__ __forceinline__ void multiply(Scores& products, const unsigned char* s_left,
                                           const unsigned char* s_right) const {
    multiply_rows<Element, Left, Right>(products, ptx::shared_address(s_left) + score_left,
                                        ptx::shared_address(s_right) + score_right);
  }

  __device__ __forceinline__ float lse_of(const QueryBlock& block, int row) const {
    const int64_t head = int64_t(tile.batch) * call.shape.num_heads + query_head(block);
    return call.lse[head * call.shape.query_length + block.index * kTileQuery + row];
  }

  // Scores become exponents of P.
  __device__ __forceinline__ void take_exponents(Scores& scores, int buffer) const {
    const float scale_log2 = call.scale * kLog2E;
#pragma unroll
    for (int g = 0; g < kScoreGroups; g++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float lse_log2 = s.lse_log2[buffer][score_row + 16 * g + 8 * r + lane / 4];
#pragma unroll
        for (int i = 0; i < kScoreKeys / 4; i++) {
          float& x = scores[g][i / 2 * 4 + 2 * r + i % 2];
          x = exponent(x, scale_log2, lse_log2);
        }
      }
  }

  // The same where some rows have large logits.
  __device__ __forceinline__ void take_careful_exponents(Scores& scores, const QueryBlock& block, int buffer) const {
    const float scale_log2 = call.scale * kLog2E;
#pragma unroll
    for (int g = 0; g < kScoreGroups; g++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int row = score_row + 16 * g + 8 * r + lane / 4;
        const float lse_log2 = s.lse_log2[buffer][row];
        const bool is_exact = is_large(lse_log2);
        const float lse = is_exact ? lse_of(block, row) : 0.f;
#pragma unroll
        for (int i = 0; i < kScoreKeys / 4; i++) {
          float& x = scores[g][i / 2 * 4 + 2 * r + i % 2];
          x = is_exact ? exact_exponent(x, call.scale, lse) : exponent(x, scale_log2, lse_log2);
        }
      }
  }

  // P of a masked pair becomes 0: behind the statistics, which may be NaN.
  __device__ __forceinline__ void mask_exponents(Scores& scores, const QueryBlock& block, bool is_cut) const {
    const int first_query = block.index * kTileQuery, column = score_key + 2 * (lane % 4);
#pragma unroll
    for (int g = 0; g < kScoreGroups; g++) {
      const int row = score_row + 16 * g + lane / 4;
      if (is_cut) {
        const Interval keys[2] = {keys_of(first_query + row), keys_of(first_query + row + 8)};
        mask_by_intervals<true>(scores[g], keys, first_key() + column);
      }
      if (block.by_ids) {
        const SegmentTables& segments = call.segments;
        const int* g_ids = segments.query_ids + int64_t(tile.batch) * segments.pitch_query + first_query + row;
        const int ids[2] = {g_ids[0], g_ids[8]};
        mask_by_ids(scores[g], ids, segments.key_ids + int64_t(tile.batch) * segments.pitch_key + first_key() + column);
      }
    }
  }

  // With softcap: scores become slope weights, and P is packed (softcap.cuh).
  using PackedScores = uint32_t[kScoreGroups][kScoreKeys / 4];
  __device__ __forceinline__ void take_capped_weights(Scores& scores, PackedScores& packed, const QueryBlock& block,
                                                      int buffer, const Rectangle& rectangle) const {
    const Softcap& softcap = p.softcap;
#pragma unroll
    for (int g = 0; g < kScoreGroups; g++) {
      softcap.apply(scores[g]);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int row = score_row + 16 * g + 8 * r + lane / 4;
        const float lse_log2 = s.lse_log2[buffer][row];
        const bool is_exact = rectangle.is_exceptional && is_large(lse_log2);
        const float lse = is_exact ? lse_of(block, row) : 0.f;
        const auto take = [&](float& t) {
          return take_weight(t,
                             is_exact ? exact_exponent(t, softcap.cap, lse) : exponent(t, softcap.cap_log2, lse_log2));
        };
#pragma unroll
        for (int group = 0; group < kScoreKeys / 8; group++) {
          float* pair = scores[g] + 4 * group + 2 * r;
          const float first = take(pair[0]);
          packed[g][2 * group + r] = ptx::pack<Element>(first, take(pair[1]));
        }
      }
    }
    if (!rectangle.is_cut && !block.by_ids) return;
    mask_exponents(scores, block, rectangle.is_cut);
#pragma unroll
    for (int g = 0; g < kScoreGroups; g++) clear_masked(scores[g], packed[g]);
  }

  static __device__ __forceinline__ void exponentiate(Scores& exponents) {
#pragma unroll
    for (int g = 0; g < kScoreGroups; g++)
#pragma unroll
      for (int i = 0; i < kScoreKeys / 2; i++) exponents[g][i] = ptx::exp2_approx(exponents[g][i]);
  }

  // P becomes dS. kIsCareful: 0 where P is, whatever dP is.
  template <bool kIsCareful>
  __device__ __forceinline__ void take_score_gradients(Scores& weights, const Scores& dp, int buffer) const {
#pragma unroll
    for (int g = 0; g < kScoreGroups; g++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float delta = s.delta[buffer][score_row + 16 * g + 8 * r + lane / 4];
#pragma unroll
        for (int i = 0; i < kScoreKeys / 4; i++) {
          const int at = i / 2 * 4 + 2 * r + i % 2;
          weights[g][at] = score_gradient<kIsCareful>(weights[g][at], dp[g][at], delta);
        }
      }
  }

  // The warp's rectangle of P or dS, to shared memory.
  __device__ __forceinline__ void store_scores(unsigned char* s_scores, const Scores& values) const {
#pragma unroll
    for (int g = 0; g < kScoreGroups; g++)
#pragma unroll
      for (int r = 0; r < 2; r++)
#pragma unroll
        for (int group = 0; group < kScoreKeys / 8; group++)
          *reinterpret_cast<uint32_t*>(s_scores + (score_store ^ group * kChunkBytes) +
                                       (16 * g + 8 * r) * kPanelRowBytes) =
              ptx::pack<Element>(values[g][4 * group + 2 * r], values[g][4 * group + 2 * r + 1]);
  }

  __device__ __forceinline__ void store_scores(unsigned char* s_scores, const PackedScores& packed) const {
#pragma unroll
    for (int g = 0; g < kScoreGroups; g++)
#pragma unroll
      for (int i = 0; i < kScoreKeys / 4; i++)
        *reinterpret_cast<uint32_t*>(s_scores + (score_store ^ i / 2 * kChunkBytes) +
                                     (16 * g + 8 * (i % 2)) * kPanelRowBytes) = packed[g][i];
  }

  // sum += scores^T right: the warp's keys, and its columns of `right`.
  template <class Right, int kSteps>
  __device__ __forceinline__ void accumulate_keys(float (&sum)[kKeyGroups][kSteps * 8], const unsigned char* s_scores,
                                                  const unsigned char* s_right,
                                                  const ColumnSteps<Right, kSteps>& columns) const {
#pragma unroll
    for (int step = 0; step < kTileQuery / 16; step++) {
      uint32_t a[kKeyGroups][4];
#pragma unroll
      for (int g = 0; g < kKeyGroups; g++)
        ptx::load_matrix_x4_transposed(key_steps.at(s_scores, g) + step * kStepBytes, a[g]);
#pragma unroll
      for (int pair = 0; pair < kSteps; pair++) {
        uint32_t b[4];
        ptx::load_matrix_x4_transposed(columns.at(s_right, pair) + step * kStepBytes, b);
#pragma unroll
        for (int g = 0; g < kKeyGroups; g++) {
          ptx::multiply<Element>(sum[g] + 8 * pair, a[g], b[0], b[1]);
          ptx::multiply<Element>(sum[g] + 8 * pair + 4, a[g], b[2], b[3]);
        }
      }
    }
  }

  // dQ of a block, to its accumulator.
  __device__ __forceinline__ void add_query_gradients(const QueryBlock& block) const {
    float dq[Dq::kGroups][Dq::kSteps * 8];
    const uint32_t rows = ptx::shared_address(s.grad_scores) + grad_query_left;
#pragma unroll
    for (int step = 0; step < Config::kTileKey / 16; step++) {
      uint32_t a[Dq::kGroups][4];
#pragma unroll
      for (int g = 0; g < Dq::kGroups; g++) Score::load_left(rows + g * kStepBytes, step, a[g]);
#pragma unroll
      for (int pair = 0; pair < Dq::kSteps; pair++) {
        uint32_t b[4];
        ptx::load_matrix_x4_transposed(grad_query_steps.at(s.k, pair) + step * kStepBytes, b);
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
    Dq::add(Dq::tile_of(p, (tile.batch - p.first_batch) * call.shape.num_heads + query_head(block), block.index), dq);
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
  __device__ __forceinline__ void store_sum(unsigned char* s_tile, const float (&sum)[kKeyGroups][kSteps * 8],
                                            float factor) const {
#pragma unroll
    for (int g = 0; g < kKeyGroups; g++)
#pragma unroll
      for (int r = 0; r < 2; r++)
#pragma unroll
        for (int group = 0; group < 2 * kSteps; group++)
          *reinterpret_cast<uint32_t*>(
              s_tile + Tile::place(key_row + 16 * g + 8 * r + lane / 4, key_column_warp * 2 * kSteps + group) +
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
    float grad_k[kKeyGroups][kGradKeySteps * 8], grad_v[kKeyGroups][kGradValueSteps * 8];
    clear(grad_k), clear(grad_v);
    ptx::wait_for_copies<0>();
    __syncthreads();
    const bool has_bad_keys = __syncthreads_or(has_non_finite_rows<Key>(s.k)),
               has_bad_values = __syncthreads_or(has_non_finite_rows<Value>(s.v));
    const auto queries_of = [&](int key) {
      return visible_queries(call, tile.batch, tile.segments.has_runs, min(first_key() + key, shape.key_length - 1));
    };
    WarpReach reach(queries_of(score_key), queries_of(score_key + kScoreKeys - 1));
    if (first_key() + score_key >= shape.key_length) reach.by_some = {0, 0};
    Scores weights, dp;
#pragma unroll 1
    for (int buffer = 0; has_block; buffer ^= 1) {
      const Rectangle rectangle = look_at(block, reach, buffer, has_bad_values);
      if (rectangle.is_needed) multiply<Query, Key>(weights, s.q[buffer], s.k);
      const bool has_next = walk.find_next(next, test);
      if (has_next) load_queries(sources, next, buffer ^ 1);
      ptx::commit_copies();
      if constexpr (Config::kHasSoftcap) {
        PackedScores packed = {};
        if (rectangle.is_needed) {
          take_capped_weights(weights, packed, block, buffer, rectangle);
          multiply<GradOut, Value>(dp, s.grad_out[buffer], s.v);
          if (rectangle.is_plain)
            take_score_gradients<false>(weights, dp, buffer);
          else
            take_score_gradients<true>(weights, dp, buffer);
        } else {
          clear(weights);
        }
        store_scores(s.weights, packed);
      } else if (rectangle.is_plain) {  // without a branch, so that exponentials and products mix
        take_exponents(weights, buffer);
        exponentiate(weights);
        multiply<GradOut, Value>(dp, s.grad_out[buffer], s.v);
        store_scores(s.weights, weights);
        take_score_gradients<false>(weights, dp, buffer);
      } else if (rectangle.is_needed) {
        if (rectangle.is_exceptional)
          take_careful_exponents(weights, block, buffer);
        else
          take_exponents(weights, buffer);
        mask_exponents(weights, block, rectangle.is_cut);
        exponentiate(weights);
        multiply<GradOut, Value>(dp, s.grad_out[buffer], s.v);
        store_scores(s.weights, weights);
        take_score_gradients<true>(weights, dp, buffer);
      } else {
        clear(weights);
        store_scores(s.weights, weights);
      }
      store_scores(s.grad_scores, weights);
      __syncthreads();  // P and dS are there, and S and dP have been multiplied
      if (rectangle.is_exceptional || has_bad_keys) [[unlikely]] {
        if (rectangle.is_exceptional) clear_exceptional_queries(s, buffer);
        if (has_bad_keys) clear_non_finite_rows<Element, Key, Config::kWarps>(s.k, 0, Config::kTileKey);
        __syncthreads();
      }
      add_query_gradients(block);
      accumulate_keys(grad_v, s.weights, s.grad_out[buffer], grad_value_steps);
      accumulate_keys(grad_k, s.grad_scores, s.q[buffer], grad_key_steps);
      if (has_bad_keys) [[unlikely]] {
        __syncthreads();  // K has been read
        load_keys();
        ptx::commit_copies();
      }
      ptx::wait_for_copies<0>();
      __syncthreads();  // the next block is there, and this one has been read
      block = next, has_block = has_next;
    }

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
