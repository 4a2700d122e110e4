// 16 rows of a tile in a warp: their queries, softmax and output, slice of keys after slice.
#pragma once
#include "config.h"
#include "flash/tile/online_softmax.cuh"
#include "flash/tile/softcap.cuh"
#include "non_finite.cuh"
#include "ptx/arithmetic.cuh"
#include "ptx/mma.cuh"
#include "ptx/register.cuh"
#include "schedule.cuh"

namespace selfattn::cuda::kv_cache {

// What the logits are of scores, which softcap leaves between -1 and 1 (softcap.cuh).
__device__ __forceinline__ float logit_scale(const KernelParams& p) {
  return p.call.softcap > 0.f ? p.call.softcap : p.call.scale;
}

// Apart, like all that few calls want: the code of a first slice comes from cold memory.
template <int kCount>
__device__ __noinline__ void apply_softcap(const Softcap& softcap, float (&scores)[kCount]) {
  softcap.apply(scores);
}

// Eight columns of a tile's row.
__device__ __forceinline__ const uint4* query_chunk(const KernelParams& p, const Walk& s_walk, int tile_row,
                                                    int chunk) {
  const KvCacheParams& call = p.call;
  const QueryRow query = s_walk.tile.query(p, tile_row);
  const int64_t head = int64_t(s_walk.piece.kv_head) * p.schedule.group.value + query.head;
  return reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(call.q.data) + query.batch * call.q.stride_batch +
                                        query.index * call.q.stride_token + head * call.q.stride_head +
                                        chunk * sm80::kChunkElements);
}

// take(where a chunk of a tile's queries belongs in Query, where it lies, whether it does), by all threads that attend.
template <class Config, class Take>
__device__ __forceinline__ void take_query_chunks(const KernelParams& p, const Walk& s_walk, const Take& take) {
  using Query = typename Config::Query;
#pragma unroll 1
  for (int i = ptx::forget(threadIdx.x); i < s_walk.tile.count * Query::kChunks; i += Config::kWarps * kWarpSize) {
    const int row = i / Query::kChunks, chunk = i % Query::kChunks;
    take(Query::place(row, chunk), query_chunk(p, s_walk, row, chunk), chunk * sm80::kChunkElements < p.call.dim_qk);
  }
}

// A tile's queries into shared memory, by all threads that attend.
template <class Config>
__device__ __forceinline__ void load_query(const KernelParams& p, const Walk& s_walk, unsigned char* s_query) {
  take_query_chunks<Config>(p, s_walk, [&](int place, const uint4* g_chunk, bool is_there) {
    *reinterpret_cast<uint4*>(s_query + place) = is_there ? *g_chunk : uint4{};
  });
}

// Starts the same and does not wait.
template <class Config>
__device__ __forceinline__ void copy_query(const KernelParams& p, const Walk& s_walk, uint32_t s_query) {
  take_query_chunks<Config>(p, s_walk, [&](int place, const uint4* g_chunk, bool is_there) {
    ptx::copy_async(s_query + place, g_chunk, is_there);
  });
  ptx::commit_copies();
}

// What the two rows of a tile that a lane has to do with may see of a piece, a bit a draft.
class VisibleOfLane {
 public:
  // s_p: the same as p, in shared memory. own_row: which row this lane finds out about, for source_lanes of others.
  // Rows past the tile's last see all, which concerns nobody.
  __device__ __forceinline__ void begin(const KernelParams& p, const KernelParams& s_p, const Walk& s_walk, int own_row,
                                        const int (&source_lanes)[2]) {
    VisibleKeys own{s_walk.piece.keys, 0, 0};
    if (own_row < s_walk.tile.count) own = visible_keys(s_p, s_walk.tile, own_row);
    shared_ =
        s_walk.piece.keys & Interval{__reduce_max_sync(~0u, own.keys.begin), __reduce_min_sync(~0u, own.keys.end)};
    first_draft_ = s_walk.tile.length - p.call.queries;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      begin_[r] = __shfl_sync(~0u, own.keys.begin, source_lanes[r]);
      count_[r] = __shfl_sync(~0u, own.keys.end, source_lanes[r]) - begin_[r];
      drafts_[r] = __shfl_sync(~0u, own.drafts, source_lanes[r]);
    }
  }
  // Whether some row of the warp does not see all of these keys.
  __device__ __forceinline__ bool cuts(int first_key, int keys) const {
    return first_key < shared_.begin || first_key + keys > shared_.end;
  }
  __device__ __forceinline__ bool sees(int r, int key) const {
    const unsigned draft = static_cast<unsigned>(key - first_draft_);
    const bool is_draft = draft < kMaxDraft && (drafts_[r] >> draft & 1);
    return static_cast<unsigned>(key - begin_[r]) < static_cast<unsigned>(count_[r]) || is_draft;
  }

 private:
  int begin_[2], count_[2];
  uint32_t drafts_[2];  // from the first on
  int first_draft_;
  Interval shared_;  // keys of the piece that all rows of the warp see
};

// For a function that is not inlined: what it is given lies in memory, and the values themselves must not.
template <int kCount, class Call>
__device__ __forceinline__ void apart(float (&values)[kCount], const Call& call) {
  float copy[kCount];
#pragma unroll
  for (int i = 0; i < kCount; i++) copy[i] = values[i];
  call(copy);
#pragma unroll
  for (int i = 0; i < kCount; i++) values[i] = copy[i];
}

// Where an element of a group's output is, in what it leaves for the merge: the columns of a row stand in groups of 8,
// swizzled. Rows 8 apart lie 8 * kDim apart.
template <class Config>
__device__ __forceinline__ int place_of_output(int row, int column) {
  return (row * Config::kDim + row % 8 * 8 + column % 8) ^ (column / 8 * 8);
}

template <class Config>
class WarpRows {
 public:
  using Element = typename Config::Element;
  using Operand = typename Config::Operand;
  using Query = typename Config::Query;
  static constexpr int kSteps = Config::kDim / 16, kSliceKeys = Config::kSliceKeys;

  // s_p: the same as p, in shared memory.
  __device__ __forceinline__ WarpRows(const KernelParams& p, const KernelParams& s_p) : p_(p), s_p_(s_p) {
    softmax_.c = logit_scale(p) * kLog2E;
  }

  // Of the 16 rows a lane has rows lane / 4 and + 8.
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }
  static __device__ __forceinline__ int first_row() {
    return static_cast<int>(threadIdx.x) / kWarpSize % Config::kRowWarps * Config::kWarpRows;
  }
  static __device__ __forceinline__ int tile_row(int r) { return first_row() + lane() / 4 + 8 * r; }

  // A piece.
  __device__ __forceinline__ void begin(const Walk& s_walk) {
    const int source_lanes[2] = {lane() / 4, lane() / 4 + 8};
    visible_.begin(p_, s_p_, s_walk, first_row() + lane() % Config::kWarpRows, source_lanes);
    softmax_.state = {{-infinity(), -infinity()}, {0.f, 0.f}};
#pragma unroll
    for (int i = 0; i < Config::kDim / 2; i++) out_[i] = 0.f;
  }

  // Its queries.
  __device__ __forceinline__ void take_query(uint32_t s_query) {
    query_place_ = Query::left_place(s_query, first_row());
    if constexpr (Config::kHoldsQuery) {
#pragma unroll
      for (int step = 0; step < kSteps; step++) Query::load_left(query_place_, step, query_[step]);
    }
  }

  // Takes in a slice that lies in shared memory, keys first.
  __device__ __forceinline__ void attend(const unsigned char* s_slot, int first_key) {
    const unsigned char* s_values = s_slot + Operand::kBytes;
    float scores[kSliceKeys / 2];
    multiply_scores(Operand::right_place(ptx::shared_address(s_slot)), scores);
    if (p_.call.softcap > 0.f) apart(scores, [&](auto& copy) { apply_softcap(s_p_.softcap, copy); });
    const bool is_cut = visible_.cuts(first_key, kSliceKeys);
    if (is_cut) mask(first_key, scores);
    softmax_.template take_max<false, true>(scores);
    softmax_.rescale(out_);
    softmax_.template exponentiate<0, kSliceKeys / 8>(scores);
    softmax_.template take_sum<false>();
    const uint32_t value_place = Operand::left_place(ptx::shared_address(s_values), 0);
    if (is_cut && !has_finite_values<Element, Operand>(s_values)) [[unlikely]]
      apart(out_, [&](auto& out) {
        apart(scores, [&](auto& weights) { multiply_non_finite_values<Element, Operand>(value_place, weights, out); });
      });
    else
      multiply_values(value_place, scores);
  }

  // The lane's row r.
  __device__ __forceinline__ SplitStats stats(int r) const {
    float sum = softmax_.state.sum[r];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    return {softmax_.state.max[r], sum};
  }

  // A row's stats by one of its lanes.
  __device__ __forceinline__ void leave_stats(SplitStats* s_stats) const {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const SplitStats own = stats(r);
      if (lane() % 4 == 0) s_stats[tile_row(r)] = own;
    }
  }

  // For the merge, the tile's first `count` rows.
  __device__ __forceinline__ void leave_output(float* s_out, int count) const {
    const int row = ptx::forget(lane()) / 4;  // what depends on it is wanted here alone
    const int first = place_of_output<Config>(row, ptx::forget(lane()) % 4 * 2);
    const bool is_row[2] = {row < count, row + 8 < count};
    give_output([&](int r, int eight, const float2& out) {
      if (is_row[r]) *reinterpret_cast<float2*>(s_out + (first ^ eight) + r * 8 * Config::kDim) = out;
    });
  }

  // take(row r of the lane, first of eight columns, those of them that begin at 2 * (lane % 4)).
  template <class Take>
  __device__ __forceinline__ void give_output(const Take& take) const {
#pragma unroll
    for (int i = 0; i < Config::kDim / 4; i++) take(i % 2, i / 2 * 8, float2{out_[2 * i], out_[2 * i + 1]});
  }

 private:
  __device__ __forceinline__ void multiply_scores(uint32_t s_keys, float (&scores)[kSliceKeys / 2]) const {
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
      uint32_t a[4];
      if constexpr (Config::kHoldsQuery) {
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = query_[step][i];
      } else {
        Query::load_left(query_place_, step, a);
      }
#pragma unroll
      for (int pair = 0; pair < kSliceKeys / 16; pair++) {
        uint32_t b[4];
        Operand::load_right(s_keys, pair, step, b);
        if (step == 0) {
          ptx::multiply_overwrite<Element>(scores + 8 * pair, a, b[0], b[1]);
          ptx::multiply_overwrite<Element>(scores + 8 * pair + 4, a, b[2], b[3]);
        } else {
          ptx::multiply<Element>(scores + 8 * pair, a, b[0], b[1]);
          ptx::multiply<Element>(scores + 8 * pair + 4, a, b[2], b[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void mask(int first_key, float (&scores)[kSliceKeys / 2]) const {
    const int first_column = first_key + ptx::forget(lane()) % 4 * 2;
#pragma unroll
    for (int i = 0; i < kSliceKeys / 2; i++) {
      if (!visible_.sees(i / 2 % 2, first_column + i / 4 * 8 + i % 2)) scores[i] = -infinity();
    }
  }

  __device__ __forceinline__ void multiply_values(uint32_t s_values, const float (&weights)[kSliceKeys / 2]) {
#pragma unroll
    for (int step = 0; step < kSliceKeys / 16; step++) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; i++) a[i] = ptx::pack<Element>(weights[8 * step + 2 * i], weights[8 * step + 2 * i + 1]);
#pragma unroll
      for (int pair = 0; pair < Config::kDim / 16; pair++) {
        uint32_t b[4];
        Operand::load_right_transposed(s_values, step, pair, b);
        ptx::multiply<Element>(out_ + 8 * pair, a, b[0], b[1]);
        ptx::multiply<Element>(out_ + 8 * pair + 4, a, b[2], b[3]);
      }
    }
  }

  const KernelParams &p_, &s_p_;
  uint32_t query_place_, query_[Config::kHoldsQuery ? kSteps : 1][4];
  VisibleOfLane visible_;
  OnlineSoftmax<kSliceKeys> softmax_;
  float out_[Config::kDim / 2];
};

}  // namespace selfattn::cuda::kv_cache
