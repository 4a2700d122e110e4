// The forward kernel: a thread block a query tile; each warp has 16 or 32 rows of it to itself, and all share the key
// blocks that they load. A step with two buffers of K and V, and with one:
//
//   S = Q K^T | start K and V of the next block | softmax | O += P V | wait for the next block, barrier
//   start V | S = Q K^T | wait for V, barrier | start the next K | softmax | O += P V | wait for the next K, barrier
//
// While a warp is at its softmax the tensor cores work for the others of the SM, most of all for its other thread
// block.
//
// What comes out not finite, and rows whose logits are too large for the fast softmax, are computed once more by the
// same warps with more care (repair.cuh of the other family says why).
#pragma once
#include <type_traits>

#include "config.h"
#include "flash/tile/capped_softmax.cuh"
#include "flash/tile/key_blocks.cuh"
#include "flash/tile/mask.cuh"
#include "flash/tile/online_softmax.cuh"
#include "flash/tile/row_segments.cuh"
#include "flash/tile/tile_order.cuh"
#include "ptx/arithmetic.cuh"
#include "ptx/mma.cuh"

namespace selfattn::cuda::sm80 {

struct ForwardKernelParams {
  ForwardParams call;
  TileSchedule schedule;
  SoftcapExponent softcap;  // read by kernels with kHasSoftcap
};

constexpr int kNoSegments = -1;  // beside the values of SegmentMode

struct QueryTile {
  int index, batch, head, head_of_all;
  int mode;
};

template <class Config>
__device__ __forceinline__ QueryTile describe_tile(const ForwardKernelParams& p) {
  const AttentionShape& shape = p.call.shape;
  const SegmentTables& segments = p.call.segments;
  const TilePlace place = find_tile(p.schedule, blockIdx.x);
  const int tiles = p.schedule.tiles_per_head;
  QueryTile tile{place.rank, place.head / shape.num_heads, place.head % shape.num_heads, place.head, kNoSegments};
  if (Config::kMask == MaskKind::kMasked && segments.mode) {
    tile.mode = segments.mode[tile.batch];
    tile.index = segments.order[tile.batch * tiles + place.rank];
  } else if (Config::kMask != MaskKind::kFull && p.call.window.right < AttentionWindow::kUnbounded) {
    tile.index = tiles - 1 - place.rank;
  }
  return tile;
}

// The keys in reach of the tile's rows.
template <class Config>
__device__ __forceinline__ Interval keys_of_tile(const ForwardParams& call, const QueryTile& tile) {
  const AttentionShape& shape = call.shape;
  const SegmentTables& segments = call.segments;
  const int first_row = tile.index * Config::kTileQuery, offset = shape.key_length - shape.query_length;
  const int last_row = min(first_row + Config::kTileQuery, shape.query_length) - 1;
  Interval keys{0, shape.key_length};
  if (Config::kMask != MaskKind::kFull) keys.end = keys_of_query(call.window, last_row, offset, shape.key_length).end;
  if (Config::kMask == MaskKind::kMasked) {
    keys.begin = keys_of_query(call.window, first_row, offset, shape.key_length).begin;
    if (tile.mode == kContiguous) {
      const int64_t row = int64_t(tile.batch) * segments.pitch_query;
      keys = keys & Interval{segments.key_begin[row + first_row], segments.key_end[row + last_row]};
    }
  }
  return keys;
}

// The ways through a tile.
enum class Pass {
  kByIntervals,  // of keys alone
  kByIds,        // pairs are compared by id, too
  kRepair,       // with more care than speed, by whatever the tile wants
};

// The blocks of an interval, from right to left.
class IntervalWalk {
 public:
  __device__ __forceinline__ explicit IntervalWalk(const Interval& blocks) : blocks_(blocks) {}

  template <class Test>
  __device__ __forceinline__ bool find_next(KeyBlock& block, const Test&) {
    if (blocks_.end <= blocks_.begin) return false;
    block.index = --blocks_.end;
    return true;
  }

 private:
  Interval blocks_;
};

// A warp's part of a tile.
template <class Config, Pass kPass>
class WarpRows {
 public:
  using Element = typename Config::Element;
  using Query = typename Config::Query;
  using Key = typename Config::Key;
  using Value = typename Config::Value;
  using Out = typename Config::Out;
  static constexpr bool kIsRepair = kPass == Pass::kRepair;
  static constexpr bool kMasked = Config::kMask == MaskKind::kMasked, kByIds = kMasked && kPass != Pass::kByIntervals;
  static constexpr bool kLimited = Config::kMask != MaskKind::kFull;
  static constexpr int kTileKey = Config::kTileKey, kGroups = Config::kRowGroups, kHeldSteps = Config::kHeldSteps;
  using Scores = float[kGroups][kTileKey / 2];

  __device__ __forceinline__ WarpRows(const ForwardKernelParams& p, const QueryTile& tile,
                                      typename Config::SharedStorage& s)
      : call_(p.call),
        softcap_(p.softcap),
        tile_(tile),
        s_(s),
        first_row_(tile.index * Config::kTileQuery),
        key_source_(first_key(p.call.k), p.call.k.stride_token, p.call.shape.dim_qk),
        value_source_(first_key(p.call.v), p.call.v.stride_token, p.call.shape.dim_v) {
    query_place_ = Query::left_place(ptx::shared_address(s.q), warp_row());
    key_place_ = Key::right_place(ptx::shared_address(s.k[0]));
    value_place_ = Value::left_place(ptx::shared_address(s.v[0]), 0);
#pragma unroll
    for (int g = 0; g < kGroups; g++) {
      softmax_[g].c = logit_scale() * kLog2E;
      softmax_[g].state = {{-infinity(), -infinity()}, {0.f, 0.f}};
#pragma unroll
      for (int i = 0; i < Config::kDimV / 2; i++) out_[g][i] = 0.f;
    }
  }

  __device__ __forceinline__ void load_query() const {
    const typename Query::template Source<Config::kThreads> source(head_of(call_.q, tile_.head), call_.q.stride_token,
                                                                   call_.shape.dim_qk);
    Query::load(ptx::shared_address(s_.q), source, first_row_, call_.shape.query_length);
  }
  __device__ __forceinline__ void load_key(int block, int buffer) const {
    load_rows<Key>(call_.k, key_source_, block, ptx::shared_address(s_.k[buffer]));
  }
  __device__ __forceinline__ void load_value(int block, int buffer) const {
    load_rows<Value>(call_.v, value_source_, block, ptx::shared_address(s_.v[buffer]));
  }

  // Whether some row of the warp may see a key of the block, by intervals.
  __device__ __forceinline__ bool needs(const KeyBlock& block) const {
    const int first_key = block.index * kTileKey;
    return first_key < reach_.end && (!kMasked || first_key + kTileKey > reach_.begin);
  }

  __device__ __forceinline__ void multiply_scores(int buffer, Scores& scores) const {
    const uint32_t key_place = key_place_ + buffer * Key::kBytes;
#pragma unroll
    for (int step = 0; step < Config::kDimQk / 16; step++) {
      uint32_t a[kGroups][4];
      load_query_step(step, a);
#pragma unroll
      for (int pair = 0; pair < kTileKey / 16; pair++) {
        uint32_t b[4];
        Key::load_right(key_place, pair, step, b);
#pragma unroll
        for (int g = 0; g < kGroups; g++) {
          if (step == 0) {
            ptx::multiply_overwrite<Element>(scores[g] + 8 * pair, a[g], b[0], b[1]);
            ptx::multiply_overwrite<Element>(scores[g] + 8 * pair + 4, a[g], b[2], b[3]);
          } else {
            ptx::multiply<Element>(scores[g] + 8 * pair, a[g], b[0], b[1]);
            ptx::multiply<Element>(scores[g] + 8 * pair + 4, a[g], b[2], b[3]);
          }
        }
      }
    }
  }

  // Leaves the keys of the tile's rows in shared memory.
  __device__ __forceinline__ void find_keys_of_rows() const {
    if constexpr (kMasked)
      for (int row = threadIdx.x; row < Config::kTileQuery; row += Config::kThreads) s_.rows[row] = find_keys(row);
  }

  // Once Q and the keys of the rows are there. Q goes into registers where they have room for it.
  __device__ __forceinline__ void begin() {
    reach_ = shared_ = {0, call_.shape.key_length};
    if (kLimited) {
      const Interval first = keys_of(warp_row()), last = keys_of(warp_row() + Config::kWarpRows - 1);
      reach_.end = last.end, shared_.end = first.end;
      if (kMasked) reach_.begin = first.begin, shared_.begin = last.begin;
    }
#pragma unroll
    for (int step = 0; step < kHeldSteps; step++)
#pragma unroll
      for (int g = 0; g < kGroups; g++) Query::load_left(query_place_ + g * 16 * kPanelRowBytes, step, held_[step][g]);
  }
  __device__ __forceinline__ void load_query_step(int step, uint32_t (&a)[kGroups][4]) const {
#pragma unroll
    for (int g = 0; g < kGroups; g++) {
      if (step < kHeldSteps) {
#pragma unroll
        for (int i = 0; i < 4; i++) a[g][i] = held_[step][g][i];
      } else {
        Query::load_left(query_place_ + g * 16 * kPanelRowBytes, step, a[g]);
      }
    }
  }

  // Scores become what the softmax takes: codes, with softcap, and masked.
  __device__ __forceinline__ void mask_scores(const KeyBlock& block, Scores& scores) {
    if constexpr (Config::kHasSoftcap) {
#pragma unroll
      for (int g = 0; g < kGroups; g++) softmax_[g].encode(softcap_, scores[g]);
    }
    const int first_key = block.index * kTileKey, first_column = first_key + 2 * (lane() % 4);
    const bool is_cut = first_key + kTileKey > shared_.end || (kMasked && first_key < shared_.begin);
    if (!is_cut && !(kByIds && block.by_ids)) return;
#pragma unroll
    for (int g = 0; g < kGroups; g++) {
      const int row = warp_row() + 16 * g + lane() / 4;
      if (is_cut) {
        const Interval keys[2] = {keys_of(row), keys_of(row + 8)};
        mask_by_intervals<kMasked>(scores[g], keys, first_column);
      }
      if (kByIds && block.by_ids) {
        const SegmentTables& segments = call_.segments;
        const int* g_ids = segments.query_ids + int64_t(tile_.batch) * segments.pitch_query + first_row_ + row;
        const int ids[2] = {g_ids[0], g_ids[8]};
        mask_by_ids(scores[g], ids, segments.key_ids + int64_t(tile_.batch) * segments.pitch_key + first_column);
      }
    }
  }

  // Scores become P; the output so far is brought to the new maxima.
  __device__ __forceinline__ void take_scores(Scores& scores) {
#pragma unroll
    for (int g = 0; g < kGroups; g++) {
      if constexpr (Config::kHasSoftcap)
        softmax_[g].template take_max<false>(softcap_, scores[g]);
      else
        softmax_[g].template take_max<false, kIsRepair>(scores[g]);
      softmax_[g].rescale(out_[g]);
      exponentiate(softmax_[g], scores[g]);
      softmax_[g].template take_sum<false>();
      is_good_enough_ = is_good_enough_ && softmax_[g].is_good_enough(0) && softmax_[g].is_good_enough(1);
    }
  }

  template <class Softmax>
  __device__ __forceinline__ void exponentiate(Softmax& softmax, float (&scores)[kTileKey / 2]) const {
    if constexpr (!Config::kHasSoftcap)
      softmax.template exponentiate<0, kTileKey / 8>(scores);
    else if (kIsRepair || softmax.has_large())
      softmax.template exponentiate_any<kIsRepair>(softcap_, scores);
    else
      softmax.template exponentiate<0, kTileKey / 8>(softcap_, scores);
  }

  __device__ __forceinline__ void multiply_out(int buffer, const Scores& weights) {
    const uint32_t value_place = value_place_ + buffer * Value::kBytes;
#pragma unroll
    for (int step = 0; step < kTileKey / 16; step++) {
      uint32_t a[kGroups][4];
#pragma unroll
      for (int g = 0; g < kGroups; g++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          a[g][i] = ptx::pack<Element>(weights[g][8 * step + 2 * i], weights[g][8 * step + 2 * i + 1]);
#pragma unroll
      for (int pair = 0; pair < Config::kDimV / 16; pair++) {
        uint32_t b[4];
        Value::load_right_transposed(value_place, step, pair, b);
#pragma unroll
        for (int g = 0; g < kGroups; g++) {
          ptx::multiply<Element>(out_[g] + 8 * pair, a[g], b[0], b[1]);
          ptx::multiply<Element>(out_[g] + 8 * pair + 4, a[g], b[2], b[3]);
        }
      }
    }
  }

  // In the repair, by all warps of the thread block: adds the products of what is not finite in V to the output of the
  // allowed pairs, and clears it for the tensor cores. `is_needed`: whether `weights` hold this warp's P.
  __device__ __forceinline__ void take_out_non_finite_values(int buffer, bool is_needed, const Scores& weights) {
    unsigned char* s_value = s_.v[buffer];
#pragma unroll 1
    for (int key = 0; is_needed && key < kTileKey; key++) {
      ptx::FiniteTest<Element> finite;
#pragma unroll 1
      for (int chunk = lane(); chunk < Value::kChunks; chunk += kWarpSize) {
        const auto* pairs = reinterpret_cast<const uint32_t*>(s_value + Value::place(key, chunk));
#pragma unroll
        for (int i = 0; i < 4; i++) finite.add(pairs[i]);
      }
      if (__all_sync(~0u, finite.all_finite())) continue;
#pragma unroll
      for (int g = 0; g < kGroups; g++) {
        // The weights of the lane's two rows with this key, from the lane of the four that has them.
        float weight[2] = {};
#pragma unroll
        for (int i = 0; i < kTileKey / 2; i++)
          if (i / 4 == key / 8 && i % 2 == key % 2) weight[i / 2 % 2] = weights[g][i];
#pragma unroll
        for (int r = 0; r < 2; r++) weight[r] = __shfl_sync(~0u, weight[r], lane() / 4 * 4 + key % 8 / 2);
#pragma unroll
        for (int i = 0; i < Config::kDimV / 2; i++) {
          const int column = i / 4 * 8 + 2 * (lane() % 4) + i % 2;
          const auto* chunk = reinterpret_cast<const Element*>(s_value + Value::place(key, column / kChunkElements));
          const float value = static_cast<float>(chunk[column % kChunkElements]);
          if (!(fabsf(value) < infinity()) && weight[i / 2 % 2] != 0.f) out_[g][i] += weight[i / 2 % 2] * value;
        }
      }
    }
    __syncthreads();  // all have read V as it came
#pragma unroll 1
    for (int number = threadIdx.x; number < kTileKey * Value::kChunks; number += Config::kThreads) {
      auto* pairs =
          reinterpret_cast<uint32_t*>(s_value + Value::place(number / Value::kChunks, number % Value::kChunks));
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float2 values = ptx::unpack<Element>(pairs[i]);
        if (!(fabsf(values.x) < infinity())) pairs[i] &= 0xffff0000u;
        if (!(fabsf(values.y) < infinity())) pairs[i] &= 0x0000ffffu;
      }
    }
    __syncthreads();
  }

  // Writes out and lse. Returns whether a row must be computed with more care.
  __device__ __forceinline__ bool finish() const {
    bool is_spoilt = false;
#pragma unroll
    for (int g = 0; g < kGroups; g++) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float sum = softmax_[g].state.sum[r];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        const float max = softmax_[g].max_score(r);
        const RowEnd end = call_.sinks ? finish_row_with_sink(max, sum, logit_scale(), call_.sinks[tile_.head])
                                       : finish_row(max, sum, logit_scale());
        const int row_in_tile = warp_row() + 16 * g + 8 * r + lane() / 4, row = first_row_ + row_in_tile;
        if (lane() % 4 == 0 && row < call_.shape.query_length)
          call_.lse[int64_t(tile_.head_of_all) * call_.shape.query_length + row] = end.lse;
        ptx::FiniteTest<Element> finite;
#pragma unroll
        for (int chunk = 0; chunk < Config::kDimV / 8; chunk++) {
          const uint32_t pair =
              ptx::pack<Element>(out_[g][4 * chunk + 2 * r] * end.factor, out_[g][4 * chunk + 2 * r + 1] * end.factor);
          finite.add(pair);
          *reinterpret_cast<uint32_t*>(s_.q + Out::place(row_in_tile, chunk) + 4 * (lane() % 4)) = pair;
        }
        is_spoilt = is_spoilt || (!finite.all_finite() && end.factor == end.factor);
      }
    }
    __syncwarp();  // the rows are this warp's own
    uint16_t* g_out = head_of(call_.out, tile_.head);
#pragma unroll 1
    for (int number = lane(); number < Config::kWarpRows * Out::kChunks; number += kWarpSize) {
      const int row_in_tile = warp_row() + number / Out::kChunks, chunk = number % Out::kChunks;
      const int row = first_row_ + row_in_tile;
      if (row < call_.shape.query_length && chunk * kChunkElements < call_.shape.dim_v)
        Out::store_chunk(g_out + row * call_.out.stride_token + chunk * kChunkElements,
                         s_.q + Out::place(row_in_tile, chunk), call_.shape.dim_v - chunk * kChunkElements);
    }
    return is_spoilt || !is_good_enough_;
  }

 private:
  // What the softmax's max_score is multiplied by for its logit.
  __device__ __forceinline__ float logit_scale() const { return Config::kHasSoftcap ? softcap_.cap : call_.scale; }
  static __device__ __forceinline__ int lane() { return threadIdx.x % kWarpSize; }
  static __device__ __forceinline__ int warp_row() { return threadIdx.x / kWarpSize * Config::kWarpRows; }
  __device__ __forceinline__ int kv_head() const {
    return tile_.head / (call_.shape.num_heads / call_.shape.num_kv_heads);
  }
  // Of K or V: in the tile's batch row, or in the first page.
  __device__ __forceinline__ const uint16_t* first_key(const TensorView& view) const {
    const uint16_t* g_head = head_of(view, kv_head());
    return Config::kReadsPages ? g_head - tile_.batch * view.stride_batch : g_head;
  }
  template <class Operand, class Source>
  __device__ __forceinline__ void load_rows(const TensorView& view, const Source& source, int block,
                                            uint32_t s_operand) const {
    if constexpr (Config::kReadsPages) {
      const Interval keys = keys_of_tile<Config>(call_, tile_);
      Operand::load_groups(s_operand, source, find_group(view, keys, block), keys.end - block * kTileKey);
    } else {
      Operand::load(s_operand, source, block * kTileKey, call_.shape.key_length);
    }
  }
  // Of the lane's group of keys in a block: where it begins, in elements from the first page on. Negative where none of
  // them is in reach: then nobody may ask for its page.
  __device__ __forceinline__ int64_t find_group(const TensorView& view, const Interval& keys, int block) const {
    constexpr int kKeyGroups = kTileKey / kCachePageMultiple;
    const int key = block * kTileKey + lane() % kKeyGroups * kCachePageMultiple, page = key / call_.pages.size;
    if (key >= keys.end || key + kCachePageMultiple <= keys.begin) return -1;
    return call_.pages.table.at(tile_.batch, page) * view.stride_batch +
           (key - page * call_.pages.size) * view.stride_token;
  }
  __device__ __forceinline__ uint16_t* head_of(const TensorView& view, int head) const {
    return static_cast<uint16_t*>(view.data) + tile_.batch * view.stride_batch + head * view.stride_head;
  }
  __device__ __forceinline__ Interval keys_of(int row_in_tile) const {
    if constexpr (kMasked)
      return s_.rows[row_in_tile];
    else
      return find_keys(row_in_tile);
  }
  __device__ __forceinline__ Interval find_keys(int row_in_tile) const {
    const AttentionShape& shape = call_.shape;
    const int row = min(first_row_ + row_in_tile, shape.query_length - 1);
    const Interval window = keys_of_query(call_.window, row, shape.key_length - shape.query_length, shape.key_length);
    if (!kMasked || tile_.mode != kContiguous) return window;
    const int64_t place = int64_t(tile_.batch) * call_.segments.pitch_query + row;
    return window & Interval{call_.segments.key_begin[place], call_.segments.key_end[place]};
  }

  const ForwardParams& call_;
  const SoftcapExponent& softcap_;
  const QueryTile& tile_;
  typename Config::SharedStorage& s_;
  int first_row_;
  typename Key::template Source<Config::kThreads> key_source_;
  typename Value::template Source<Config::kThreads> value_source_;
  uint32_t query_place_, key_place_, value_place_;
  Interval reach_, shared_;  // keys that some row may see, and that all may see, by intervals
  uint32_t held_[kHeldSteps ? kHeldSteps : 1][kGroups][4];  // Q's first columns
  float out_[kGroups][Config::kDimV / 2];
  std::conditional_t<Config::kHasSoftcap, CappedSoftmax<kTileKey>, OnlineSoftmax<kTileKey>> softmax_[kGroups];
  bool is_good_enough_ = true;
};

// One pass over a tile. Returns whether a row of this warp must be computed with more care.
template <class Config, Pass kPass>
__device__ __forceinline__ bool attend(const ForwardKernelParams& p, const QueryTile& tile,
                                       typename Config::SharedStorage& s) {
  using Rows = WarpRows<Config, kPass>;
  const SegmentTables& segments = p.call.segments;
  const bool by_ids = Rows::kByIds && tile.mode == kGeneral;
  const auto test = [&](int index, bool& meets, bool& is_uniform) {
    if (!by_ids) return;
    const SegmentBlock queries = segments.query_blocks[int64_t(tile.batch) * segments.query_tiles + tile.index],
                       keys = segments.key_blocks[int64_t(tile.batch) * segments.key_tiles + index];
    meets = may_share_segment(queries, keys), is_uniform = is_one_segment(queries, keys);
  };
  Rows rows(p, tile, s);
  rows.load_query();
  std::conditional_t<Rows::kByIds, KeyBlockWalk, IntervalWalk> walk(
      blocks_of(keys_of_tile<Config>(p.call, tile), Config::kTileKey));
  KeyBlock block{0, false, false}, next{0, false, false};
  bool has_block = walk.find_next(block, test);
  constexpr bool kIsDouble = Config::kBuffers == 2;
  if (has_block) rows.load_key(block.index, 0);
  if (kIsDouble && has_block) rows.load_value(block.index, 0);
  ptx::commit_copies();
  rows.find_keys_of_rows();
  ptx::wait_for_copies<0>();
  __syncthreads();
  rows.begin();
  typename Rows::Scores scores;
#pragma unroll 1
  for (int buffer = 0; has_block; buffer ^= kIsDouble) {
    if constexpr (!kIsDouble) {
      rows.load_value(block.index, buffer);
      ptx::commit_copies();
    }
    const bool is_needed = rows.needs(block), has_next = walk.find_next(next, test);
    if (is_needed) rows.multiply_scores(buffer, scores);
    if constexpr (kIsDouble) {
      if (has_next) rows.load_key(next.index, buffer ^ 1), rows.load_value(next.index, buffer ^ 1);
    } else {
      ptx::wait_for_copies<0>();
      __syncthreads();  // V is there, and K has been read
      if (has_next) rows.load_key(next.index, buffer);
    }
    ptx::commit_copies();
    if (is_needed) {
      rows.mask_scores(block, scores);
      rows.take_scores(scores);
    }
    if (Rows::kIsRepair) rows.take_out_non_finite_values(buffer, is_needed, scores);
    if (is_needed) rows.multiply_out(buffer, scores);
    ptx::wait_for_copies<0>();
    __syncthreads();  // the next block (its K, with one buffer) is there, and this one has been read
    block = next, has_block = has_next;
  }
  return rows.finish();
}

// Apart from the first pass, whose registers it must not take; so it finds out for itself what the tile is.
template <class Config>
__device__ __noinline__ void repair(const ForwardKernelParams& p, typename Config::SharedStorage& s) {
  const QueryTile tile = describe_tile<Config>(p);
  attend<Config, Pass::kRepair>(p, tile, s);
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksAtOnce)
    flash_attention_forward_kernel(const __grid_constant__ ForwardKernelParams p) {
  extern __shared__ __align__(128) unsigned char s_memory[];
  auto& s = *reinterpret_cast<typename Config::SharedStorage*>(s_memory);
  const QueryTile tile = describe_tile<Config>(p);
  bool is_spoilt;
  if (Config::kMask == MaskKind::kMasked && !Config::kReadsPages && tile.mode == kGeneral)
    is_spoilt = attend<Config, Pass::kByIds>(p, tile, s);
  else
    is_spoilt = attend<Config, Pass::kByIntervals>(p, tile, s);
  if (__syncthreads_or(is_spoilt)) repair<Config>(p, s);
}

}  // namespace selfattn::cuda::sm80
