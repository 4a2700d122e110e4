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
#include "row_stats.cuh"

namespace selfattn::cuda::sm80 {

// The steps first .. first + kSteps - 1 of 16 columns that a warp has of an operand: `place` is that of step 0.
template <class Tile, int kSteps>
struct ColumnSteps {
  static constexpr bool kIsPowerOfTwo = (kSteps & (kSteps - 1)) == 0;
  uint32_t place;
  int first;

  __device__ __forceinline__ ColumnSteps(uint32_t s_place, int first_step)
      : place(kIsPowerOfTwo ? Tile::at_step(s_place, first_step) : s_place), first(first_step) {}
  __device__ __forceinline__ uint32_t at(int step) const {
    return kIsPowerOfTwo ? Tile::at_step(place, step) : Tile::at_step(place, first + step);
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

  const BackwardKernelParams& p;
  const BackwardParams& call;
  const KeyTile& tile;
  Storage& s;
  int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int score_row = warp / Config::kScoreKeyWarps * (16 * kScoreGroups),
      score_key = warp % Config::kScoreKeyWarps * kScoreKeys;
  int key_row = warp / Config::kKeyColumnWarps * (16 * kKeyGroups), key_column_warp = warp % Config::kKeyColumnWarps;

  __device__ __forceinline__ int first_key() const { return tile.index * Config::kTileKey; }
  __device__ __forceinline__ int query_head(const QueryBlock& block) const {
    return tile.kv_head * (call.shape.num_heads / call.shape.num_kv_heads) + block.head;
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
  // Q and dO with the statistics of their rows and, where there are runs, these.
  __device__ __forceinline__ void load_queries(const QueryBlock& block, int buffer) const {
    const AttentionShape& shape = call.shape;
    const int head = query_head(block), first = block.index * kTileQuery;
    Query::template load<kThreads>(ptx::shared_address(s.q[buffer]),
                                   {head_of(call.q, tile.batch, head), call.q.stride_token, shape.dim_qk}, first,
                                   shape.query_length);
    GradOut::template load<kThreads>(
        ptx::shared_address(s.grad_out[buffer]),
        {head_of(call.grad_out, tile.batch, head), call.grad_out.stride_token, shape.dim_v}, first, shape.query_length);
    constexpr int kWords = kChunkBytes / 4, kChunks = kTileQuery / kWords;
    static_assert(4 * kChunks <= kThreads);
    const int array = threadIdx.x / kChunks, column = threadIdx.x % kChunks * kWords;
    if (array < 2) {
      const float* g_stats = (array ? p.delta : p.lse_log2) +
                             (int64_t(tile.batch) * shape.num_heads + head) * p.stat_pitch + first + column;
      ptx::copy_async(ptx::shared_address((array ? s.delta : s.lse_log2)[buffer] + column), g_stats, true);
    } else if (array < 4 && tile.segments.has_runs) {
      const int* g_runs = (array == 2 ? call.segments.run_begin : call.segments.run_end) +
                          int64_t(tile.batch) * call.segments.pitch_query + first + column;
      ptx::copy_async(ptx::shared_address((array == 2 ? s.run_begin : s.run_end)[buffer] + column), g_runs, true);
    }
  }

  // The keys that the row of a block may see, ids aside.
  __device__ __forceinline__ Interval keys_of(int first_query, int row, int buffer) const {
    const AttentionShape& shape = call.shape;
    const int in_length = min(row, shape.query_length - 1 - first_query);
    const Interval keys =
        keys_of_query(call.window, first_query + in_length, shape.key_length - shape.query_length, shape.key_length);
    return tile.segments.has_runs ? keys & Interval{s.run_begin[buffer][in_length], s.run_end[buffer][in_length]}
                                  : keys;
  }

  // Whether a row of the block is out of the ordinary; the same for all warps.
  __device__ __forceinline__ bool has_exceptional_rows(int buffer) const {
    static_assert(kTileQuery == 2 * kWarpSize);
    const float2 stats = *reinterpret_cast<const float2*>(s.lse_log2[buffer] + 2 * lane);
    return __any_sync(~0u, !(fabsf(stats.x) < kExactFrom) || !(fabsf(stats.y) < kExactFrom));
  }

  // left right^T of the warp's rows of `left` and its keys.
  template <class Left, class Right>
  __device__ __forceinline__ void multiply(Scores& products, const unsigned char* s_left,
                                           const unsigned char* s_right) const {
    multiply_rows<Element, Left, Right>(products, Left::left_place(ptx::shared_address(s_left), score_row),
                                        Right::right_place(ptx::shared_address(s_right)) + score_key * kPanelRowBytes);
  }

  // Scores become P. Where the warp's rectangle has no allowed pair nothing need be multiplied.
  __device__ __forceinline__ void take_weights(Scores& scores, const QueryBlock& block, int buffer, bool is_cut,
                                               bool is_exceptional) const {
    const float scale_log2 = call.scale * kLog2E;
    const int first_query = block.index * kTileQuery;
    if (is_exceptional) {
#pragma unroll
      for (int g = 0; g < kScoreGroups; g++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const int row = score_row + 16 * g + 8 * r + lane / 4;
          const float lse_log2 = s.lse_log2[buffer][row];
          const bool is_exact = is_large(lse_log2);
          const float lse = is_exact ? call.lse[(int64_t(tile.batch) * call.shape.num_heads + query_head(block)) *
                                                    call.shape.query_length +
                                                first_query + row]
                                     : 0.f;
#pragma unroll
          for (int i = 0; i < kScoreKeys / 4; i++) {
            float& x = scores[g][i / 2 * 4 + 2 * r + i % 2];
            x = is_exact ? exact_exponent(x, call.scale, lse) : exponent(x, scale_log2, lse_log2);
          }
        }
    } else {
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
    // Behind the statistics, which may be NaN: P of a masked pair is 0 all the same.
    mask(scores, block, buffer, is_cut);
#pragma unroll
    for (int g = 0; g < kScoreGroups; g++)
#pragma unroll
      for (int i = 0; i < kScoreKeys / 2; i++) scores[g][i] = ptx::exp2_approx(scores[g][i]);
  }

  // The same with softcap: scores become slope weights, and P is packed (softcap.cuh).
  __device__ __forceinline__ void take_capped_weights(Scores& scores, uint32_t (&packed)[kScoreGroups][kScoreKeys / 4],
                                                      const QueryBlock& block, int buffer, bool is_cut,
                                                      bool is_exceptional) const {
    const Softcap& softcap = p.softcap;
#pragma unroll
    for (int g = 0; g < kScoreGroups; g++) {
      softcap.apply(scores[g]);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int row = score_row + 16 * g + 8 * r + lane / 4;
        const float lse_log2 = s.lse_log2[buffer][row];
        const bool is_exact = is_exceptional && is_large(lse_log2);
        const float lse =
            is_exact
                ? call.lse[(int64_t(tile.batch) * call.shape.num_heads + query_head(block)) * call.shape.query_length +
                           block.index * kTileQuery + row]
                : 0.f;
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
    mask(scores, block, buffer, is_cut);
    if (is_cut || block.by_ids) {
#pragma unroll
      for (int g = 0; g < kScoreGroups; g++) clear_masked(scores[g], packed[g]);
    }
  }

  // Scores of masked pairs become -inf.
  __device__ __forceinline__ void mask(Scores& scores, const QueryBlock& block, int buffer, bool is_cut) const {
    const int first_query = block.index * kTileQuery;
    if (is_cut || block.by_ids) {
      const int column = score_key + 2 * (lane % 4);
#pragma unroll
      for (int g = 0; g < kScoreGroups; g++) {
        const int row = score_row + 16 * g + lane / 4;
        if (is_cut) {
          const Interval keys[2] = {keys_of(first_query, row, buffer), keys_of(first_query, row + 8, buffer)};
          mask_by_intervals<true>(scores[g], keys, first_key() + column);
        }
        if (block.by_ids) {
          const SegmentTables& segments = call.segments;
          const int* g_ids = segments.query_ids + int64_t(tile.batch) * segments.pitch_query + first_query + row;
          const int ids[2] = {g_ids[0], g_ids[8]};
          mask_by_ids(scores[g], ids,
                      segments.key_ids + int64_t(tile.batch) * segments.pitch_key + first_key() + column);
        }
      }
    }
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
          *reinterpret_cast<uint32_t*>(
              s_scores + Score::place(score_row + 16 * g + 8 * r + lane / 4, score_key / 8 + group) + 4 * (lane % 4)) =
              ptx::pack<Element>(values[g][4 * group + 2 * r], values[g][4 * group + 2 * r + 1]);
  }

  __device__ __forceinline__ void store_scores(unsigned char* s_scores,
                                               const uint32_t (&packed)[kScoreGroups][kScoreKeys / 4]) const {
#pragma unroll
    for (int g = 0; g < kScoreGroups; g++)
#pragma unroll
      for (int i = 0; i < kScoreKeys / 4; i++)
        *reinterpret_cast<uint32_t*>(s_scores +
                                     Score::place(score_row + 16 * g + 8 * (i % 2) + lane / 4, score_key / 8 + i / 2) +
                                     4 * (lane % 4)) = packed[g][i];
  }

  // sum += scores^T right: the warp's keys, and kSteps * 16 columns of `right`.
  template <class Right, int kSteps>
  __device__ __forceinline__ void accumulate_keys(float (&sum)[kKeyGroups][kSteps * 8], const unsigned char* s_scores,
                                                  const unsigned char* s_right) const {
    const ColumnSteps<Score, kKeyGroups> keys(Score::right_place(ptx::shared_address(s_scores)), key_row / 16);
    const ColumnSteps<Right, kSteps> columns(Right::left_place(ptx::shared_address(s_right), 0),
                                             key_column_warp * kSteps);
#pragma unroll
    for (int step = 0; step < kTileQuery / 16; step++) {
      uint32_t a[kKeyGroups][4];
#pragma unroll
      for (int g = 0; g < kKeyGroups; g++) ptx::load_matrix_x4_transposed(keys.at(g) + step * kStepBytes, a[g]);
#pragma unroll
      for (int pair = 0; pair < kSteps; pair++) {
        uint32_t b[4];
        ptx::load_matrix_x4_transposed(columns.at(pair) + step * kStepBytes, b);
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
    using Dq = DqAccumulator<Config>;
    float dq[Dq::kGroups][Dq::kSteps * 8];
    const uint32_t rows = Score::left_place(ptx::shared_address(s.grad_scores), Dq::warp_row());
    const ColumnSteps<Key, Dq::kSteps> columns(Key::left_place(ptx::shared_address(s.k), 0),
                                               Dq::column_warp() * Dq::kSteps);
#pragma unroll
    for (int step = 0; step < Config::kTileKey / 16; step++) {
      uint32_t a[Dq::kGroups][4];
#pragma unroll
      for (int g = 0; g < Dq::kGroups; g++) Score::load_left(rows + g * kStepBytes, step, a[g]);
#pragma unroll
      for (int pair = 0; pair < Dq::kSteps; pair++) {
        uint32_t b[4];
        ptx::load_matrix_x4_transposed(columns.at(pair) + step * kStepBytes, b);
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
    QueryBlockWalk walk(tile.blocks, shape.num_heads / shape.num_kv_heads, true);
    const auto test = [&](int index, bool& meets, bool& is_uniform) {
      if (tile.segments.has_ids) compare_ids<Config>(call.segments, tile, index, meets, is_uniform);
    };
    QueryBlock block{0, 0, false}, next{0, 0, false};
    bool has_block = walk.find_next(block, test);
    load_keys(), load_values();
    if (has_block) load_queries(block, 0);
    ptx::commit_copies();
    float grad_k[kKeyGroups][kGradKeySteps * 8], grad_v[kKeyGroups][kGradValueSteps * 8];
    clear(grad_k), clear(grad_v);
    ptx::wait_for_copies<0>();
    __syncthreads();
    const bool has_bad_keys = __syncthreads_or(has_non_finite_rows<Key>(s.k)),
               has_bad_values = __syncthreads_or(has_non_finite_rows<Value>(s.v));

#pragma unroll 1
    for (int buffer = 0; has_block; buffer = Config::kBuffers == 2 ? buffer ^ 1 : 0) {
      const bool has_next = walk.find_next(next, test);
      if (Config::kBuffers == 2 && has_next) load_queries(next, buffer ^ 1);
      ptx::commit_copies();
      const int first_query = block.index * kTileQuery, key = first_key() + score_key;
      const Interval first_row = keys_of(first_query, score_row, buffer),
                     last_row = keys_of(first_query, score_row + 16 * kScoreGroups - 1, buffer);
      const bool is_needed = first_query + score_row < shape.query_length && key < last_row.end &&
                             key + kScoreKeys > first_row.begin,
                 is_cut = key < last_row.begin || key + kScoreKeys > first_row.end;
      const bool is_exceptional = has_exceptional_rows(buffer);
      Scores weights, dp;
      if (is_needed) {
        multiply<Query, Key>(weights, s.q[buffer], s.k);
        if constexpr (Config::kHasSoftcap) {
          uint32_t packed[kScoreGroups][kScoreKeys / 4];
          take_capped_weights(weights, packed, block, buffer, is_cut, is_exceptional);
          store_scores(s.weights, packed);
        } else {
          take_weights(weights, block, buffer, is_cut, is_exceptional);
          store_scores(s.weights, weights);
        }
        multiply<GradOut, Value>(dp, s.grad_out[buffer], s.v);
        if (is_cut || block.by_ids || is_exceptional || has_bad_values)
          take_score_gradients<true>(weights, dp, buffer);
        else
          take_score_gradients<false>(weights, dp, buffer);
      } else {
        clear(weights);
        store_scores(s.weights, weights);
      }
      store_scores(s.grad_scores, weights);
      __syncthreads();  // P and dS are there, and S and dP have been multiplied
      if (is_exceptional || has_bad_keys) [[unlikely]] {
        if (is_exceptional) clear_exceptional_queries(s, buffer);
        if (has_bad_keys) clear_non_finite_rows<Element, Key, Config::kWarps>(s.k, 0, Config::kTileKey);
        __syncthreads();
      }
      add_query_gradients(block);
      accumulate_keys<GradOut, kGradValueSteps>(grad_v, s.weights, s.grad_out[buffer]);
      accumulate_keys<Query, kGradKeySteps>(grad_k, s.grad_scores, s.q[buffer]);
      if (Config::kBuffers == 1 || has_bad_keys) {
        __syncthreads();  // this block has been read
        if (Config::kBuffers == 1 && has_next) load_queries(next, 0);
        if (has_bad_keys) load_keys();
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
  SinglePass<Config>{p, p.call, tile, s}.run();
}

}  // namespace selfattn::cuda::sm80
