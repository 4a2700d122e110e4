// One kernel reads the whole cache: as many thread blocks as the device holds at once, each with an equal share of the
// keys (schedule.cuh). A share is a row of pieces, a piece some keys of one tile of rows and one kv head.
//
//   each group of warps, on its own:  wait for a slice | S = Q K^T | softmax | O += P V | start the copies of the slice
//                                     that is kStages behind it, of whichever piece
//   at the end of a piece, together:  the groups' O -> shared memory | merge them -> the output, or a partial result
//   at the end of a split head tile:    the thread block that arrives last merges its partial results, in their order
//
// No barrier of the thread block stands between the slices, and while a piece ends, copies of the next ones go on.
#pragma once
#include "loader.cuh"
#include "ptx/barrier.cuh"
#include "ptx/grid.cuh"
#include "ptx/launch.cuh"
#include "rows.cuh"

namespace selfattn::cuda::kv_cache {

// Until a ring of so many stages has its oldest slice.
template <int kMostStages>
__device__ __forceinline__ void wait_for_slice(int stages) {
  if constexpr (kMostStages > 2) {
    if (stages < kMostStages) return wait_for_slice<kMostStages - 1>(stages);
  }
  ptx::wait_for_copies<kMostStages - 1>();
}

// Results of parts of a row's keys become one, part after part.
template <int kWidth>
struct RowMerge {
  float max = -infinity(), sum = 0.f, out[kWidth] = {};

  // `c`: scale * log2(e).
  __device__ __forceinline__ void add(const SplitStats& part, const float (&part_out)[kWidth], float c) {
    const float top = fmaxf(max, part.x), base = top == -infinity() ? 0.f : top;
    const float before = ptx::exp2_approx((max - base) * c), weight = ptx::exp2_approx((part.x - base) * c);
    max = top, sum = sum * before + part.y * weight;
#pragma unroll
    for (int i = 0; i < kWidth; i++) out[i] = out[i] * before + part_out[i] * weight;
  }
};

// Of one head tile.
template <class Config>
class Results {
 public:
  using Element = typename Config::Element;

  __device__ __forceinline__ Results(const KernelParams& p, const Share& share, const Walk& walk, const Piece& piece)
      : p_(p), share_(share), tile_(walk.tile()), piece_(piece) {
    const int first_unit = walk.head_tile_start() + p.schedule.overhead;
    first_block_ = share.owner(first_unit), last_block_ = share.owner(first_unit + tile_.units - 1);
    if (p.call.split_keys) {
      first_part_ =
          (int64_t(walk.tile_index()) * p.call.num_kv_heads + piece.kv_head) * p.schedule.splits_per_head_tile;
    } else {
      // A thread block has two places: of the head tile that began before it, and of the one that goes on behind it.
      first_part_ = 2 * first_block_ + (share.begin_of(first_block_) <= walk.head_tile_start());
      later_parts_ = 2 * (first_block_ + 1);
    }
  }

  __device__ __forceinline__ bool is_partial() const { return !piece_.is_whole; }
  __device__ __forceinline__ int first_block() const { return first_block_; }
  __device__ __forceinline__ int blocks() const { return last_block_ - first_block_ + 1; }

  // The result of the piece. column is a multiple of kWidth.
  template <int kWidth>
  __device__ __forceinline__ void write(int tile_row, int column, const SplitStats& stats,
                                        const float (&out)[kWidth]) const {
    if (is_partial())
      write_partial<kWidth>(part_of_piece(), tile_row, column, stats, out);
    else
      write_final<kWidth>(tile_row, column, stats, out);
  }

  // By the whole thread block, when all partial results are there.
  __device__ __forceinline__ void merge_parts() const {
    constexpr int kWidth = 4, kAtOnce = 8, kChunks = Config::kDim / kWidth;
    const int parts = p_.call.split_keys ? tile_.units : blocks();
    const float c = logit_scale(p_) * kLog2E;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < tile_.count * kChunks; i += Config::kThreads) {
      const int tile_row = i / kChunks, column = i % kChunks * kWidth;
      RowMerge<kWidth> merge;
#pragma unroll 1
      for (int first = 0; first < parts; first += kAtOnce) {
        SplitStats stats[kAtOnce];
        float4 out[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; j++) {
          const int64_t place = part(::min(first + j, parts - 1)) * Config::kTileRows + tile_row;
          stats[j] = __ldcg(p_.partial_stats + place);
          out[j] = __ldcg(reinterpret_cast<const float4*>(p_.partial_out + place * Config::kDim + column));
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; j++)
          if (first + j < parts) merge.add(stats[j], {out[j].x, out[j].y, out[j].z, out[j].w}, c);
      }
      write_final<kWidth>(tile_row, column, {merge.max, merge.sum}, merge.out);
    }
  }

 private:
  // Where the i-th partial result of the head tile is.
  __device__ __forceinline__ int64_t part(int i) const {
    if (p_.call.split_keys) return first_part_ + i;
    return i == 0 ? first_part_ : later_parts_ + 2 * (i - 1);
  }
  __device__ __forceinline__ int64_t part_of_piece() const {
    return part(p_.call.split_keys ? piece_.first_unit : static_cast<int>(blockIdx.x) - first_block_);
  }

  template <int kWidth>
  __device__ __forceinline__ void write_partial(int64_t part, int tile_row, int column, const SplitStats& stats,
                                                const float (&out)[kWidth]) const {
    const int64_t place = part * Config::kTileRows + tile_row;
    if (column == 0) p_.partial_stats[place] = stats;
    float* g_out = p_.partial_out + place * Config::kDim + column;
    if constexpr (kWidth == 4)
      *reinterpret_cast<float4*>(g_out) = {out[0], out[1], out[2], out[3]};
    else
      *reinterpret_cast<float2*>(g_out) = {out[0], out[1]};
  }

  template <int kWidth>
  __device__ __forceinline__ void write_final(int tile_row, int column, const SplitStats& stats,
                                              const float (&out)[kWidth]) const {
    const KvCacheParams& call = p_.call;
    const Query query = tile_.query(p_, tile_row);
    const int head = piece_.kv_head * p_.schedule.group.value + query.head;
    const float scale = logit_scale(p_);
    const RowEnd end = call.sinks ? finish_row_with_sink(stats.x, stats.y, scale, call.sinks[head])
                                  : finish_row(stats.x, stats.y, scale);
    if (column == 0) call.lse[(query.batch * call.num_heads + head) * call.queries + query.index] = end.lse;
    if (column >= call.dim_v) return;
    auto* g_out = static_cast<Element*>(call.out) +
                  ((query.batch * call.queries + query.index) * call.num_heads + head) * call.dim_v + column;
    const auto pair = [&](int i) { return ptx::pack<Element>(out[i] * end.factor, out[i + 1] * end.factor); };
    if constexpr (kWidth == 4)
      *reinterpret_cast<uint2*>(g_out) = {pair(0), pair(2)};
    else
      *reinterpret_cast<uint32_t*>(g_out) = pair(0);
  }

  const KernelParams& p_;
  const Share& share_;
  const Tile& tile_;
  const Piece& piece_;
  int first_block_, last_block_;
  int64_t first_part_, later_parts_ = 0;
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksAtOnce)
    flash_attention_kv_cache_kernel(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(128) unsigned char s_memory[];
  auto& s_state = *reinterpret_cast<typename Config::SharedState*>(s_memory + p.stages * Config::kStageBytes);
  const int group = static_cast<int>(threadIdx.x) / Config::kGroupThreads;
  unsigned char* s_ring = s_memory + group * p.stages * Config::kSlotBytes;
  const auto slot = [&](int stage) { return s_ring + stage * Config::kSlotBytes; };
  const auto sync_group = [&] {
    if constexpr (Config::kRowWarps == 1)
      __syncwarp();
    else
      ptx::barrier_sync(1 + group, Config::kGroupThreads);
  };

  if (p.schedule.is_prepared) ptx::wait_for_previous_kernel();  // its schedule is there
  const Share share = find_share(p);
  Loader<Config> loader(p, share);
  Walk walk(p, share);
  Piece piece;
  WarpRows<Config> rows(p);
  int to_load = share.begin < share.end ? p.stages : 0, load_stage = 0, stage = 0;
  int slice = 0, last_slice = 0;  // of the piece, for this group
  bool is_at_begin = true;
#pragma unroll 1
  for (;;) {
#pragma unroll 1
    for (; to_load > 0; to_load--) {
      loader.load_next(ptx::shared_address(slot(load_stage)));
      if (++load_stage == p.stages) load_stage = 0;
    }
    if (is_at_begin) {
      if (!walk.find_next(p, share, piece)) break;
      rows.begin(walk.tile(), piece);
      slice = first_slice_of<Config>(piece.keys, group);
      last_slice = (piece.keys.end + Config::kSliceKeys - 1) / Config::kSliceKeys;
      is_at_begin = false;
    }
    unsigned char* s_read = nullptr;  // the slot that is not filled again yet
    if (slice < last_slice) {
      s_read = slot(stage);
      wait_for_slice<Config::kStages>(p.stages);
      sync_group();  // all of the group's copies are there
      rows.attend(s_read, slice * Config::kSliceKeys);
      sync_group();  // the slot has been read
      slice += Config::kKeyGroups, to_load = 1;
      if (++stage == p.stages) stage = 0;
    }
    if (slice < last_slice) continue;

    is_at_begin = true;
    const Results<Config> results(p, share, walk, piece);
    const int count = walk.tile().count;
    if constexpr (Config::kKeyGroups == 1) {
      const SplitStats stats[2] = {rows.stats(0), rows.stats(1)};
      rows.give_output([&](int r, int column, const float2& out) {
        if (rows.tile_row(r) < count) results.template write<2>(rows.tile_row(r), column, stats[r], {out.x, out.y});
      });
    } else {
      // Each group leaves its results; the columns of a row stand in its slot in groups of 8, swizzled.
      constexpr int kChunks = Config::kDim / 4;
      const auto place = [](int tile_row, int column) {
        return tile_row * Config::kDim + (column / 8 ^ tile_row % 8) * 8 + column % 8;
      };
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const SplitStats stats = rows.stats(r);
        if (rows.lane() % 4 == 0) s_state.stats[group][rows.tile_row(r)] = stats;
      }
      if (s_read) {
        auto* s_out = reinterpret_cast<float*>(s_read);
        rows.give_output([&](int r, int column, const float2& out) {
          *reinterpret_cast<float2*>(s_out + place(rows.tile_row(r), column)) = out;
        });
      }
      s_state.outputs[group] = reinterpret_cast<float*>(s_read);
      __syncthreads();
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < count * kChunks; i += Config::kThreads) {
        const int tile_row = i / kChunks, column = i % kChunks * 4;
        RowMerge<4> merge;
#pragma unroll
        for (int g = 0; g < Config::kKeyGroups; g++) {
          if (!s_state.outputs[g]) continue;  // it had no slice
          const float4 out = *reinterpret_cast<const float4*>(s_state.outputs[g] + place(tile_row, column));
          merge.add(s_state.stats[g][tile_row], {out.x, out.y, out.z, out.w}, logit_scale(p) * kLog2E);
        }
        results.template write<4>(tile_row, column, {merge.max, merge.sum}, merge.out);
      }
    }
    __syncthreads();  // all results of the piece are written, and slots are free

    if (results.is_partial() && piece.ends_part) {
      if (results.blocks() > 1) {
        if (threadIdx.x == 0) {
          ptx::wait_for_previous_kernel();  // it clears the counters
          __threadfence();
          const int before = atomicAdd(p.schedule.counters + results.first_block(), 1);
          __threadfence();
          s_state.is_last_arriver = before == results.blocks() - 1;
        }
        __syncthreads();
      }
      if (results.blocks() == 1 || s_state.is_last_arriver) results.merge_parts();
    }
  }
  ptx::wait_for_previous_kernel();
}

}  // namespace selfattn::cuda::kv_cache
