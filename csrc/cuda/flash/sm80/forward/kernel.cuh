// The forward kernel: a thread block a query tile; each warp has 16 or 32 rows of it to itself, and all share the key
// blocks that they load.
//
//   wait for K | start V | S = Q K^T, mask | wait for V | start the next K | softmax, O += P V
//
// What comes out not finite, and rows whose logits are too large for the fast softmax, are computed once more by the
// same warps with more care (repair.cuh of the other family says why).
#pragma once
#include "config.h"
#include "flash/tile/key_blocks.cuh"
#include "flash/tile/mask.cuh"
#include "flash/tile/online_softmax.cuh"
#include "flash/tile/tile_order.cuh"
#include "ptx/arithmetic.cuh"
#include "ptx/mma.cuh"

namespace selfattn::cuda::sm80 {

struct ForwardKernelParams {
  ForwardParams call;
  TileSchedule schedule;
};

constexpr int kNoSegments = -1;  // beside the values of SegmentMode

struct QueryTile {
  int index, batch, head, head_of_all;
  int mode;
  Interval blocks;  // of keys, in reach of its rows
};

template <class Config>
__device__ __forceinline__ QueryTile describe_tile(const ForwardKernelParams& p) {
  const AttentionShape& shape = p.call.shape;
  const SegmentTables& segments = p.call.segments;
  const TilePlace place = find_tile(p.schedule, blockIdx.x);
  const int tiles = p.schedule.tiles_per_head;
  QueryTile tile{place.rank, place.head / shape.num_heads, place.head % shape.num_heads, place.head, kNoSegments, {}};
  if (Config::kMask == MaskKind::kMasked && segments.mode) {
    tile.mode = segments.mode[tile.batch];
    tile.index = segments.order[tile.batch * tiles + place.rank];
  } else if (Config::kMask != MaskKind::kFull && p.call.window.right < AttentionWindow::kUnbounded) {
    tile.index = tiles - 1 - place.rank;
  }
  const int first_row = tile.index * Config::kTileQuery, offset = shape.key_length - shape.query_length;
  const int last_row = min(first_row + Config::kTileQuery, shape.query_length) - 1;
  Interval keys{0, shape.key_length};
  if (Config::kMask != MaskKind::kFull) keys.end = keys_of_query(p.call.window, last_row, offset, shape.key_length).end;
  if (Config::kMask == MaskKind::kMasked) {
    keys.begin = keys_of_query(p.call.window, first_row, offset, shape.key_length).begin;
    if (tile.mode == kContiguous) {
      const int64_t row = int64_t(tile.batch) * segments.pitch_query;
      keys = keys & Interval{segments.run_begin[row + first_row], segments.run_end[row + last_row]};
    }
  }
  tile.blocks = {keys.begin / Config::kTileKey, keys.end > keys.begin ? (keys.end - 1) / Config::kTileKey + 1 : 0};
  return tile;
}

// Adds the products of what is not finite in V to the output of the allowed pairs, and clears it for the tensor cores.
// By all warps of the thread block, with P in `weights` (0 where a pair is masked).
template <class Config>
__device__ __noinline__ void clear_non_finite_values(unsigned char* s_value) {
  using Value = typename Config::Value;
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
  for (int key = threadIdx.x / kWarpSize; key < Config::kTileKey; key += Config::kWarps) {
#pragma unroll 1
    for (int chunk = lane; chunk < Value::kChunks; chunk += kWarpSize) {
      uint32_t* pairs = reinterpret_cast<uint32_t*>(s_value + Value::place(key, chunk));
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float2 values = ptx::unpack<typename Config::Element>(pairs[i]);
        if (!(fabsf(values.x) < infinity())) pairs[i] &= 0xffff0000u;
        if (!(fabsf(values.y) < infinity())) pairs[i] &= 0x0000ffffu;
      }
    }
  }
}

// One pass over a tile. Returns whether a row of this warp must be computed with more care.
template <class Config, bool kIsRepair>
__device__ __forceinline__ bool attend(const ForwardKernelParams& p, const QueryTile& tile,
                                       typename Config::SharedStorage& s) {
  using Element = typename Config::Element;
  using Query = typename Config::Query;
  using Key = typename Config::Key;
  using Value = typename Config::Value;
  using Out = typename Config::Out;
  constexpr bool kMasked = Config::kMask == MaskKind::kMasked, kLimited = Config::kMask != MaskKind::kFull;
  constexpr int kTileKey = Config::kTileKey, kGroups = Config::kRowGroups;
  const AttentionShape& shape = p.call.shape;
  const SegmentTables& segments = p.call.segments;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int offset = shape.key_length - shape.query_length;
  const int warp_row = warp * Config::kWarpRows, first_row = tile.index * Config::kTileQuery;
  const int kv_head = tile.head / (shape.num_heads / shape.num_kv_heads);
  const uint32_t s_q = ptx::shared_address(s.q), s_k = ptx::shared_address(s.k), s_v = ptx::shared_address(s.v);
  const uint32_t query_place = Query::left_place(s_q, warp_row), key_place = Key::right_place(s_k),
                 value_place = Value::left_place(s_v, 0);

  const auto head_of = [](const TensorView& view, int batch, int head) {
    return static_cast<uint16_t*>(view.data) + batch * view.stride_batch + head * view.stride_head;
  };
  const auto load_key = [&](int block) {
    Key::template load<Config::kThreads>(s_k, head_of(p.call.k, tile.batch, kv_head), p.call.k.stride_token,
                                         block * kTileKey, shape.key_length, shape.dim_qk);
  };
  const auto load_value = [&](int block) {
    Value::template load<Config::kThreads>(s_v, head_of(p.call.v, tile.batch, kv_head), p.call.v.stride_token,
                                           block * kTileKey, shape.key_length, shape.dim_v);
  };
  const auto keys_of = [&](int row_in_tile) {
    const int row = min(first_row + row_in_tile, shape.query_length - 1);
    const Interval window = keys_of_query(p.call.window, row, offset, shape.key_length);
    if (!kMasked || tile.mode != kContiguous) return window;
    const int64_t place = int64_t(tile.batch) * segments.pitch_query + row;
    return window & Interval{segments.run_begin[place], segments.run_end[place]};
  };

  const bool by_ids = kMasked && tile.mode == kGeneral;
  const auto test = [&](int index, bool& meets, bool& is_uniform) {
    if (!by_ids) return;
    const SegmentBlock queries = segments.query_blocks[int64_t(tile.batch) * segments.query_tiles + tile.index],
                       keys = segments.key_blocks[int64_t(tile.batch) * segments.key_tiles + index];
    meets = may_share_segment(queries, keys), is_uniform = is_one_segment(queries, keys);
  };
  KeyBlockWalk walk(tile.blocks.begin, tile.blocks.end, -1);
  KeyBlock block{0, false, false}, next{0, false, false};
  bool has_block = walk.find_next(block, test);

  Query::template load<Config::kThreads>(s_q, head_of(p.call.q, tile.batch, tile.head), p.call.q.stride_token,
                                         first_row, shape.query_length, shape.dim_qk);
  if (has_block) load_key(block.index);
  ptx::commit_copies();

  // Of the warp's rows: the keys that some row may see, and that all see, by intervals.
  Interval reach{0, shape.key_length}, shared = reach;
  if (kLimited) {
    const Interval first = keys_of(warp_row), last = keys_of(warp_row + Config::kWarpRows - 1);
    reach.end = last.end, shared.end = first.end;
    if (kMasked) reach.begin = first.begin, shared.begin = last.begin;
  }

  float out[kGroups][Config::kDimV / 2];
  OnlineSoftmax<kTileKey> softmax[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; g++) {
    softmax[g].c = p.call.scale * kLog2E;
    softmax[g].state = {{-infinity(), -infinity()}, {0.f, 0.f}};
#pragma unroll
    for (int i = 0; i < Config::kDimV / 2; i++) out[g][i] = 0.f;
  }
  bool is_good_enough = true;

#pragma unroll 1
  while (has_block) {
    const bool has_next = walk.find_next(next, test);
    const int first_key = block.index * kTileKey;
    const bool is_needed = first_key < reach.end && (!kMasked || first_key + kTileKey > reach.begin);
    ptx::wait_for_copies<0>();
    __syncthreads();  // K is there, and V of the block before has been read
    load_value(block.index);
    ptx::commit_copies();

    float scores[kGroups][kTileKey / 2];
    if (is_needed) {
#pragma unroll
      for (int g = 0; g < kGroups; g++)
#pragma unroll
        for (int i = 0; i < kTileKey / 2; i++) scores[g][i] = 0.f;
#pragma unroll
      for (int step = 0; step < Config::kDimQk / 16; step++) {
        uint32_t a[kGroups][4];
#pragma unroll
        for (int g = 0; g < kGroups; g++) Query::load_left(query_place + g * 16 * kPanelRowBytes, step, a[g]);
#pragma unroll
        for (int pair = 0; pair < kTileKey / 16; pair++) {
          uint32_t b[4];
          Key::load_right(key_place, pair, step, b);
#pragma unroll
          for (int g = 0; g < kGroups; g++) {
            ptx::multiply<Element>(scores[g] + 8 * pair, a[g], b[0], b[1]);
            ptx::multiply<Element>(scores[g] + 8 * pair + 4, a[g], b[2], b[3]);
          }
        }
      }
      const int first_column = first_key + 2 * (lane % 4);
      const bool is_cut = first_key + kTileKey > shared.end || (kMasked && first_key < shared.begin);
      if (is_cut || block.by_ids) {
#pragma unroll
        for (int g = 0; g < kGroups; g++) {
          const int row = warp_row + 16 * g + lane / 4;
          if (is_cut) {
            const Interval keys[2] = {keys_of(row), keys_of(row + 8)};
            mask_by_intervals<kMasked>(scores[g], keys, first_column);
          }
          if (kMasked && block.by_ids) {
            const int* g_ids = segments.query_ids + int64_t(tile.batch) * segments.pitch_query + first_row + row;
            const int ids[2] = {g_ids[0], g_ids[8]};
            mask_by_ids(scores[g], ids, segments.key_ids + int64_t(tile.batch) * segments.pitch_key + first_column);
          }
        }
      }
    }

    ptx::wait_for_copies<0>();
    __syncthreads();  // V is there, and K has been read
    if (has_next) load_key(next.index);
    ptx::commit_copies();

    if (is_needed) {
#pragma unroll
      for (int g = 0; g < kGroups; g++) {
        softmax[g].template take_max<false, kIsRepair>(scores[g]);
        softmax[g].rescale(out[g]);
        softmax[g].template exponentiate<0, kTileKey / 8>(scores[g]);
        softmax[g].template take_sum<false>();
        is_good_enough = is_good_enough && softmax[g].is_good_enough(0) && softmax[g].is_good_enough(1);
      }
    }
    if constexpr (kIsRepair) {
      if (is_needed) {
#pragma unroll 1
        for (int key = 0; key < kTileKey; key++) {
          ptx::FiniteTest<Element> finite;
#pragma unroll 1
          for (int chunk = lane; chunk < Value::kChunks; chunk += kWarpSize) {
            const auto* pairs = reinterpret_cast<const uint32_t*>(s.v + Value::place(key, chunk));
#pragma unroll
            for (int i = 0; i < 4; i++) finite.add(pairs[i]);
          }
          if (__all_sync(~0u, finite.all_finite())) continue;
#pragma unroll
          for (int g = 0; g < kGroups; g++) {
            float weight[2] = {};
#pragma unroll
            for (int i = 0; i < kTileKey / 2; i++)
              if (i / 4 == key / 8 && i % 2 == key % 2) weight[i / 2 % 2] = scores[g][i];
#pragma unroll
            for (int r = 0; r < 2; r++) weight[r] = __shfl_sync(~0u, weight[r], lane / 4 * 4 + key % 8 / 2);
#pragma unroll
            for (int i = 0; i < Config::kDimV / 2; i++) {
              const int column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
              const auto* chunk = reinterpret_cast<const Element*>(s.v + Value::place(key, column / kChunkElements));
              const float value = static_cast<float>(chunk[column % kChunkElements]);
              if (!(fabsf(value) < infinity()) && weight[i / 2 % 2] != 0.f) out[g][i] += weight[i / 2 % 2] * value;
            }
          }
        }
      }
      __syncthreads();  // all have read V as it came
      clear_non_finite_values<Config>(s.v);
      __syncthreads();
    }
    if (is_needed) {
#pragma unroll
      for (int step = 0; step < kTileKey / 16; step++) {
        uint32_t weights[kGroups][4];
#pragma unroll
        for (int g = 0; g < kGroups; g++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            weights[g][i] = ptx::pack<Element>(scores[g][8 * step + 2 * i], scores[g][8 * step + 2 * i + 1]);
#pragma unroll
        for (int pair = 0; pair < Config::kDimV / 16; pair++) {
          uint32_t b[4];
          Value::load_right_transposed(value_place, step, pair, b);
#pragma unroll
          for (int g = 0; g < kGroups; g++) {
            ptx::multiply<Element>(out[g] + 8 * pair, weights[g], b[0], b[1]);
            ptx::multiply<Element>(out[g] + 8 * pair + 4, weights[g], b[2], b[3]);
          }
        }
      }
    }
    block = next, has_block = has_next;
  }
  ptx::wait_for_copies<0>();
  __syncthreads();  // Q is there even where no block was, before its memory is written over

  bool is_spoilt = false;
#pragma unroll
  for (int g = 0; g < kGroups; g++) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float sum = softmax[g].state.sum[r];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const float max = softmax[g].state.max[r];
      const RowEnd end = p.call.sinks ? finish_row_with_sink(max, sum, p.call.scale, p.call.sinks[tile.head])
                                      : finish_row(max, sum, p.call.scale);
      const int row_in_tile = warp_row + 16 * g + 8 * r + lane / 4, row = first_row + row_in_tile;
      if (lane % 4 == 0 && row < shape.query_length)
        p.call.lse[int64_t(tile.head_of_all) * shape.query_length + row] = end.lse;
      ptx::FiniteTest<Element> finite;
#pragma unroll
      for (int chunk = 0; chunk < Config::kDimV / 8; chunk++) {
        const uint32_t pair =
            ptx::pack<Element>(out[g][4 * chunk + 2 * r] * end.factor, out[g][4 * chunk + 2 * r + 1] * end.factor);
        finite.add(pair);
        *reinterpret_cast<uint32_t*>(s.q + Out::place(row_in_tile, chunk) + 4 * (lane % 4)) = pair;
      }
      is_spoilt = is_spoilt || (!finite.all_finite() && end.factor == end.factor);
    }
  }
  __syncwarp();
  auto* g_out = head_of(p.call.out, tile.batch, tile.head);
#pragma unroll 1
  for (int number = lane; number < Config::kWarpRows * Out::kChunks; number += kWarpSize) {
    const int row_in_tile = warp_row + number / Out::kChunks, chunk = number % Out::kChunks;
    const int row = first_row + row_in_tile;
    if (row < shape.query_length && chunk * kChunkElements < shape.dim_v)
      *reinterpret_cast<uint4*>(g_out + row * p.call.out.stride_token + chunk * kChunkElements) =
          *reinterpret_cast<const uint4*>(s.q + Out::place(row_in_tile, chunk));
  }
  return !kIsRepair && (is_spoilt || !is_good_enough);
}

// Apart from the first pass, whose registers it must not take.
template <class Config>
__device__ __noinline__ void repair(const ForwardKernelParams& p, const QueryTile& tile,
                                    typename Config::SharedStorage& s) {
  attend<Config, true>(p, tile, s);
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksAtOnce)
    flash_attention_forward_kernel(const __grid_constant__ ForwardKernelParams p) {
  extern __shared__ __align__(128) unsigned char s_memory[];
  auto& s = *reinterpret_cast<typename Config::SharedStorage*>(s_memory);
  const QueryTile tile = describe_tile<Config>(p);
  if (__syncthreads_or(attend<Config, false>(p, tile, s))) repair<Config>(p, tile, s);
}

}  // namespace selfattn::cuda::sm80
