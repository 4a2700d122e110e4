// What becomes of a piece: the output of its head tile, or a partial result that is merged with the others.
#pragma once
#include "config.h"
#include "flash/tile/online_softmax.cuh"
#include "ptx/arithmetic.cuh"
#include "ptx/grid.cuh"
#include "rows.cuh"
#include "schedule.cuh"

namespace selfattn::cuda::kv_cache {

// The thread blocks that have units of a head tile, and where they leave their partial results: in steps, the first one
// shifted.
struct Parts {
  int first_block, blocks, count, step, shift;
  int64_t base;

  __device__ __forceinline__ Parts() : first_block(0), blocks(1), count(1), step(1), shift(0), base(0) {}
  // Of a piece that is not a whole head tile.
  __device__ __forceinline__ Parts(const KernelParams& p, const Share& s_share, const Walk& s_walk) {
    const int first_unit = s_walk.head_tile_start + p.schedule.overhead;
    first_block = s_share.owner(first_unit);
    blocks = s_share.owner(first_unit + s_walk.tile.units - 1) - first_block + 1;
    if (p.call.split_keys) {
      count = s_walk.tile.units, step = 1, shift = 0;
      base =
          (int64_t(s_walk.tile_index) * p.call.num_kv_heads + s_walk.piece.kv_head) * p.schedule.splits_per_head_tile;
    } else {
      // A thread block has two places: of the head tile that began before it, and of the one that goes on behind it.
      count = blocks, step = 2, shift = s_share.begin_of(first_block) <= s_walk.head_tile_start;
      base = 2 * first_block;
    }
  }

  // Where the i-th partial result is.
  __device__ __forceinline__ int64_t place(int i) const { return base + int64_t(step) * i + (i == 0 ? shift : 0); }
  __device__ __forceinline__ int64_t place_of(const KernelParams& p, const Piece& piece) const {
    return place(p.call.split_keys ? piece.first_unit : static_cast<int>(blockIdx.x) - first_block);
  }
};

// Of a whole head tile there are none.
__device__ __forceinline__ Parts find_parts(const KernelParams& p, const Share& s_share, const Walk& s_walk) {
  return s_walk.is_whole() ? Parts() : Parts(p, s_share, s_walk);
}

// Results of parts of a row's keys become one, part after part.
template <int kWidth>
struct RowMerge {
  float max = -infinity(), sum = 0.f, out[kWidth] = {};

  // Before the parts of a batch whose largest score is `top`. c: scale * log2(e).
  __device__ __forceinline__ void raise(float top, float c) {
    top = fmaxf(max, top);
    base_ = top == -infinity() ? 0.f : top;
    const float before = ptx::exp2_approx((max - base_) * c);
    max = top, sum *= before;
#pragma unroll
    for (int i = 0; i < kWidth; i++) out[i] *= before;
  }
  __device__ __forceinline__ void add(const SplitStats& part, const float (&part_out)[kWidth], float c) {
    const float weight = ptx::exp2_approx((part.x - base_) * c);
    sum += part.y * weight;
#pragma unroll
    for (int i = 0; i < kWidth; i++) out[i] += part_out[i] * weight;
  }

 private:
  float base_ = 0.f;
};

// kWidth neighbours, aligned to their size or to 16 bytes, from any memory.
template <int kWidth, class Load>
__device__ __forceinline__ void load_columns(const float* columns, float (&out)[kWidth], const Load& load) {
  if constexpr (kWidth == 2) {
    const float2 pair = load(reinterpret_cast<const float2*>(columns));
    out[0] = pair.x, out[1] = pair.y;
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; i += 4) {
      const float4 four = load(reinterpret_cast<const float4*>(columns + i));
      out[i] = four.x, out[i + 1] = four.y, out[i + 2] = four.z, out[i + 3] = four.w;
    }
  }
}

struct FinishedRow {
  int64_t offset;  // in out
  float factor;    // of what has been added up
};

__device__ __forceinline__ float read_sink(const KvCacheParams& call, int head) {
  if (call.sink_type == ElementType::kFloat) return static_cast<const float*>(call.sinks)[head];
  const uint16_t bits = static_cast<const uint16_t*>(call.sinks)[head];
  return call.sink_type == ElementType::kHalf ? __half2float(__ushort_as_half(bits))
                                              : __bfloat162float(__ushort_as_bfloat16(bits));
}

// Writes lse.
inline __device__ __noinline__ FinishedRow finish(const KernelParams& p, const Walk& s_walk, int tile_row,
                                                  SplitStats stats, bool is_first_lane) {
  const KvCacheParams& call = p.call;
  const QueryRow query = s_walk.tile.query(p, tile_row);
  const int head = s_walk.piece.kv_head * p.schedule.group.value + query.head;
  const float scale = logit_scale(p);
  RowEnd end;
  if (call.sinks)
    end = finish_row_with_sink(stats.x, stats.y, scale, read_sink(call, head));
  else
    end = finish_row(stats.x, stats.y, scale);
  if (is_first_lane) call.lse[(int64_t(query.batch) * call.num_heads + head) * call.queries + query.index] = end.lse;
  return {((int64_t(query.batch) * call.queries + query.index) * call.num_heads + head) * call.dim_v, end.factor};
}

// Of queries that belong to no row of the cache, which see nothing: each by one thread block.
inline __device__ __noinline__ void finish_queries_of_none(const KernelParams& p) {
  const KvCacheParams& call = p.call;
  const int threads = static_cast<int>(blockDim.x), chunks = call.num_heads * call.dim_v / 8;  // of 16 bytes
  const int count = p.schedule.token_counts[call.rows], first = call.batch * call.queries - count;
#pragma unroll 1
  for (int i = static_cast<int>(blockIdx.x); i < count; i += static_cast<int>(gridDim.x)) {
    const int token = p.schedule.token_order[first + i], batch = token / p.schedule.queries;
    auto* out = static_cast<uint4*>(call.out) + int64_t(token) * chunks;
#pragma unroll 1
    for (int chunk = static_cast<int>(threadIdx.x); chunk < chunks; chunk += threads) out[chunk] = {};
#pragma unroll 1
    for (int head = static_cast<int>(threadIdx.x); head < call.num_heads; head += threads)
      call.lse[(int64_t(batch) * call.num_heads + head) * call.queries + token - batch * call.queries] =
          call.sinks ? read_sink(call, head) : -infinity();
  }
}

// Where a row's result goes.
template <class Config>
class RowTarget {
 public:
  using Element = typename Config::Element;

  // A partial result.
  __device__ __forceinline__ RowTarget(const KernelParams& p, int64_t part, int tile_row, const SplitStats& stats,
                                       bool is_first_lane)
      : columns_(Config::kDim) {
    const int64_t place = part * Config::kTileRows + tile_row;
    if (is_first_lane) p.partial_stats[place] = stats;
    g_partial_ = p.partial_out + place * Config::kDim;
  }

  // The output.
  __device__ __forceinline__ RowTarget(const KernelParams& p, const Walk& s_walk, int tile_row, const SplitStats& stats,
                                       bool is_first_lane)
      : columns_(p.call.dim_v) {
    const FinishedRow row = finish(p, s_walk, tile_row, stats, is_first_lane);
    factor_ = row.factor;
    g_out_ = static_cast<Element*>(p.call.out) + row.offset;
  }

  // column: a multiple of kWidth.
  template <int kWidth>
  __device__ __forceinline__ void store(int column, const float (&out)[kWidth]) const {
    if (column >= columns_) return;
    if (g_partial_) {
      if constexpr (kWidth == 2) {
        *reinterpret_cast<float2*>(g_partial_ + column) = {out[0], out[1]};
      } else {
#pragma unroll
        for (int i = 0; i < kWidth; i += 4)
          *reinterpret_cast<float4*>(g_partial_ + column + i) = {out[i], out[i + 1], out[i + 2], out[i + 3]};
      }
      return;
    }
    uint32_t packed[kWidth / 2];
#pragma unroll
    for (int i = 0; i < kWidth / 2; i++) packed[i] = ptx::pack<Element>(out[2 * i] * factor_, out[2 * i + 1] * factor_);
    if constexpr (kWidth == 2)
      *reinterpret_cast<uint32_t*>(g_out_ + column) = packed[0];
    else if constexpr (kWidth == 4)
      *reinterpret_cast<uint2*>(g_out_ + column) = {packed[0], packed[1]};
    else
      *reinterpret_cast<uint4*>(g_out_ + column) = {packed[0], packed[1], packed[2], packed[3]};
  }

 private:
  float* g_partial_ = nullptr;
  Element* g_out_ = nullptr;
  float factor_ = 1.f;
  int columns_;
};

// Of a row of a piece.
template <class Config>
__device__ __forceinline__ RowTarget<Config> target_of(const KernelParams& p, const Walk& s_walk, const Parts& parts,
                                                       int row, const SplitStats& stats, bool is_first_lane) {
  return s_walk.is_whole() ? RowTarget<Config>(p, s_walk, row, stats, is_first_lane)
                           : RowTarget<Config>(p, parts.place_of(p, s_walk.piece), row, stats, is_first_lane);
}

// Over a warp.
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
    value = fmaxf(value, __shfl_xor_sync(~0u, value, distance));
  return value;
}
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

// When all partial results of a head tile are there, by `warp` of those that attend: a warp a row. Of so many
// parts as a warp has lanes, each lane weighs one.
template <class Config>
__device__ __noinline__ void merge_parts(const KernelParams& p, const Parts parts, const Walk& s_walk, int warp) {
  constexpr int kWidth = Config::kDim / kWarpSize, kAtOnce = 8;
  const float c = logit_scale(p) * kLog2E;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, column = lane * kWidth;
#pragma unroll 1
  for (int row = warp; row < s_walk.tile.count; row += Config::kWarps) {
    float max = -infinity(), sum = 0.f, weight = 0.f, out[kWidth] = {};
#pragma unroll 1
    for (int first = 0; first < parts.count; first += kAtOnce) {
      float part_out[kAtOnce][kWidth];
#pragma unroll
      for (int j = 0; j < kAtOnce; j++) {
#pragma unroll
        for (int i = 0; i < kWidth; i++) part_out[j][i] = 0.f;
        if (first + j < parts.count) {
          const int64_t place = parts.place(first + j) * Config::kTileRows + row;
          load_columns(p.partial_out + place * Config::kDim + column, part_out[j],
                       [](const auto* g) { return __ldcg(g); });
        }
      }
      if (first % kWarpSize == 0) {
        SplitStats stats{-infinity(), 0.f};
        if (first + lane < parts.count)
          stats = __ldcg(p.partial_stats + parts.place(first + lane) * Config::kTileRows + row);
        const float top = fmaxf(max, warp_max(stats.x)), base = top == -infinity() ? 0.f : top;
        const float before = ptx::exp2_approx((max - base) * c);
        weight = ptx::exp2_approx((stats.x - base) * c);
        max = top, sum = sum * before + warp_sum(stats.y * weight);
#pragma unroll
        for (int i = 0; i < kWidth; i++) out[i] *= before;
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; j++) {
        const float weight_of_part = __shfl_sync(~0u, weight, (first + j) % kWarpSize);
#pragma unroll
        for (int i = 0; i < kWidth; i++) out[i] += part_out[j][i] * weight_of_part;
      }
    }
    RowTarget<Config>(p, s_walk, row, {max, sum}, lane == 0).store(column, out);
  }
}

// The results of a piece's groups become its own: some of the rows by each of the warps that attend.
template <class Config>
__device__ __forceinline__ void merge_groups(const KernelParams& p, const SplitStats* s_stats,
                                             const float* const* outputs, const Parts& parts, const Walk& s_walk,
                                             int warp) {
  constexpr int kWidth = Config::kDim / kWarpSize;
  const float c = logit_scale(p) * kLog2E;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, column = lane * kWidth;
#pragma unroll 1
  for (int row = warp; row < s_walk.tile.count; row += Config::kWarps) {
    RowMerge<kWidth> merge;
    float top = -infinity();
#pragma unroll
    for (int g = 0; g < Config::kKeyGroups; g++) top = fmaxf(top, s_stats[g * Config::kTileRows + row].x);
    merge.raise(top, c);
#pragma unroll
    for (int g = 0; g < Config::kKeyGroups; g++) {
      const float* s_out = outputs[g];
      if (!s_out) continue;  // it had no slice
      float out[kWidth];
      load_columns(s_out + place_of_output<Config>(row, column), out, [](const auto* s) { return *s; });
      merge.add(s_stats[g * Config::kTileRows + row], out, c);
    }
    target_of<Config>(p, s_walk, parts, row, {merge.max, merge.sum}, lane == 0).store(column, merge.out);
  }
}

// Once all results of a piece are written, by some of the threads, which `sync` synchronises: whether those of the head
// tile are to be merged, since it was the last that was wanted.
template <class Sync>
__device__ __forceinline__ bool ends_head_tile(const KernelParams& p, const Parts& parts, const Walk& s_walk,
                                               int& s_is_last_arriver, int thread, const Sync& sync) {
  if (s_walk.is_whole() || !s_walk.piece.ends_part) return false;
  if (parts.blocks == 1) return true;
  if (thread == 0) {
    const int before = ptx::add_acquire_release(p.schedule.counters + parts.first_block, 1);
    s_is_last_arriver = before == parts.blocks - 1;
  }
  sync();
  return s_is_last_arriver;
}

}  // namespace selfattn::cuda::kv_cache
