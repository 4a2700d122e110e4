// 16 rows of a tile in a warp: their queries, softmax and output, slice of keys after slice.
#pragma once
#include "config.h"
#include "flash/tile/online_softmax.cuh"
#include "flash/tile/softcap.cuh"
#include "ptx/arithmetic.cuh"
#include "ptx/mma.cuh"
#include "schedule.cuh"

namespace selfattn::cuda::kv_cache {

// Of a row and some of its keys: the largest score, and the sum of exponentials less it.
using SplitStats = float2;

// What the logits are of scores, which softcap leaves between -1 and 1 (softcap.cuh).
__device__ __forceinline__ float logit_scale(const KernelParams& p) {
  return p.call.softcap > 0.f ? p.call.softcap : p.call.scale;
}

template <class Config>
class WarpRows {
 public:
  using Element = typename Config::Element;
  using Operand = typename Config::Operand;
  static constexpr int kSteps = Config::kDim / 16, kSliceKeys = Config::kSliceKeys;

  __device__ __forceinline__ explicit WarpRows(const KernelParams& p) : p_(p) { softmax_.c = logit_scale(p) * kLog2E; }

  // Of the 16 rows a lane has rows lane / 4 and + 8.
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }
  static __device__ __forceinline__ int tile_row(int r) {
    return static_cast<int>(threadIdx.x) / kWarpSize % Config::kRowWarps * 16 + lane() / 4 + 8 * r;
  }

  __device__ __forceinline__ void begin(const Tile& tile, const Piece& piece) {
    const KvCacheParams& call = p_.call;
#pragma unroll
    for (int step = 0; step < kSteps; step++)
#pragma unroll
      for (int i = 0; i < 4; i++) query_[step][i] = 0;
    Interval shared = piece.keys;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      visible_[r] = {piece.keys, 0, 0};
      if (tile_row(r) >= tile.count) continue;
      visible_[r] = visible_keys(p_, tile, tile_row(r));
      shared = shared & visible_[r].keys;
      const Query query = tile.query(p_, tile_row(r));
      const int64_t head = int64_t(piece.kv_head) * p_.schedule.group.value + query.head;
      const uint16_t* g_row = static_cast<const uint16_t*>(call.q.data) + query.batch * call.q.stride_batch +
                              query.index * call.q.stride_token + head * call.q.stride_head;
#pragma unroll
      for (int step = 0; step < kSteps; step++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int column = step * 16 + half * 8 + lane() % 4 * 2;
          if (column < call.dim_qk) query_[step][2 * half + r] = *reinterpret_cast<const uint32_t*>(g_row + column);
        }
    }
    shared_ = {__reduce_max_sync(~0u, shared.begin), __reduce_min_sync(~0u, shared.end)};
    softmax_.state = {{-infinity(), -infinity()}, {0.f, 0.f}};
#pragma unroll
    for (int i = 0; i < Config::kDim / 2; i++) out_[i] = 0.f;
  }

  // Takes in a slice that lies in shared memory, keys first.
  __device__ __forceinline__ void attend(const unsigned char* s_slot, int first_key) {
    const unsigned char* s_values = s_slot + Operand::kBytes;
    float scores[kSliceKeys / 2];
    multiply_scores(Operand::right_place(ptx::shared_address(s_slot)), scores);
    if (p_.call.softcap > 0.f) p_.softcap.apply(scores);
    const bool is_cut = first_key < shared_.begin || first_key + kSliceKeys > shared_.end;
    if (is_cut) mask(first_key, scores);
    softmax_.template take_max<false, true>(scores);
    softmax_.rescale(out_);
    softmax_.template exponentiate<0, kSliceKeys / 8>(scores);
    softmax_.template take_sum<false>();
    const uint32_t value_place = Operand::left_place(ptx::shared_address(s_values), 0);
    if (is_cut && !has_finite_values(s_values)) [[unlikely]]
      multiply_non_finite_values(value_place, scores);
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

  // take(row r of the lane, column, two neighbours of the output).
  template <class Take>
  __device__ __forceinline__ void give_output(const Take& take) const {
#pragma unroll
    for (int i = 0; i < Config::kDim / 4; i++)
      take(i % 2, i / 2 * 8 + lane() % 4 * 2, float2{out_[2 * i], out_[2 * i + 1]});
  }

 private:
  __device__ __forceinline__ void multiply_scores(uint32_t s_keys, float (&scores)[kSliceKeys / 2]) const {
#pragma unroll
    for (int step = 0; step < kSteps; step++)
#pragma unroll
      for (int pair = 0; pair < kSliceKeys / 16; pair++) {
        uint32_t b[4];
        Operand::load_right(s_keys, pair, step, b);
        if (step == 0) {
          ptx::multiply_overwrite<Element>(scores + 8 * pair, query_[step], b[0], b[1]);
          ptx::multiply_overwrite<Element>(scores + 8 * pair + 4, query_[step], b[2], b[3]);
        } else {
          ptx::multiply<Element>(scores + 8 * pair, query_[step], b[0], b[1]);
          ptx::multiply<Element>(scores + 8 * pair + 4, query_[step], b[2], b[3]);
        }
      }
  }

  __device__ __forceinline__ void mask(int first_key, float (&scores)[kSliceKeys / 2]) const {
#pragma unroll
    for (int i = 0; i < kSliceKeys / 2; i++)
      if (!visible_[i / 2 % 2].has(first_key + i / 4 * 8 + lane() % 4 * 2 + i % 2)) scores[i] = -infinity();
  }

  __device__ __forceinline__ void multiply_values(uint32_t s_values, const float (&weights)[kSliceKeys / 2]) {
#pragma unroll
    for (int step = 0; step < kSliceKeys / 16; step++) {
      uint32_t a[4];
      pack_weights(weights, step, a, [](float weight) { return weight; });
#pragma unroll
      for (int pair = 0; pair < Config::kDim / 16; pair++) {
        uint32_t b[4];
        Operand::load_right_transposed(s_values, step, pair, b);
        ptx::multiply<Element>(out_ + 8 * pair, a, b[0], b[1]);
        ptx::multiply<Element>(out_ + 8 * pair + 4, a, b[2], b[3]);
      }
    }
  }

  template <class Change>
  static __device__ __forceinline__ void pack_weights(const float (&weights)[kSliceKeys / 2], int step,
                                                      uint32_t (&a)[4], const Change& change) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      a[i] = ptx::pack<Element>(change(weights[8 * step + 2 * i]), change(weights[8 * step + 2 * i + 1]));
  }

  // Where NaN or infinity must not meet the weight of 0 of a key that is not visible: they are taken out of the values,
  // and a second product tells who meets them. The output goes round in a loop: unrolled, what is seldom wanted is more
  // code than all the rest.
  __device__ __forceinline__ void multiply_non_finite_values(uint32_t s_values,
                                                             const float (&weights)[kSliceKeys / 2]) {
    constexpr int kPairs = Config::kDim / 16, kCount = Config::kDim / 2;
#pragma unroll
    for (int step = 0; step < kSliceKeys / 16; step++) {
      uint32_t a[4], is_met[4];
      pack_weights(weights, step, a, [](float weight) { return weight; });
      pack_weights(weights, step, is_met, [](float weight) { return weight != 0.f ? 1.f : 0.f; });
#pragma unroll 1
      for (int pair = 0; pair < kPairs; pair++) {
        uint32_t b[4], kinds[4];
        float group[8];
        Operand::load_right_transposed(s_values, step, pair, b);
#pragma unroll
        for (int i = 0; i < 4; i++) kinds[i] = take_out_non_finite(b[i]);
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float* out = group + 4 * half;
          ptx::multiply_overwrite<Element>(out, is_met, kinds[2 * half], kinds[2 * half + 1]);
#pragma unroll
          for (int i = 0; i < 4; i++) out[i] = out_[4 * half + i] + sum_of_kinds(out[i]);
          ptx::multiply<Element>(out, a, b[2 * half], b[2 * half + 1]);
        }
#pragma unroll
        for (int i = 0; i < kCount; i++) out_[i] = i < kCount - 8 ? out_[i + 8] : group[i % 8];
      }
    }
  }

  // Kinds of values as numbers, of which those of 16 keys can be added up: each is more than so many of the one before.
  static constexpr float kPlusInfinity = 1.f, kMinusInfinity = 128.f, kNaN = 16384.f;

  static __device__ __forceinline__ float kind_of(float value) {
    if (fabsf(value) < infinity()) return 0.f;
    return value == infinity() ? kPlusInfinity : value == -infinity() ? kMinusInfinity : kNaN;
  }
  static __device__ __forceinline__ uint32_t take_out_non_finite(uint32_t& packed) {
    const float2 values = ptx::unpack<Element>(packed), kinds = {kind_of(values.x), kind_of(values.y)};
    if (kinds.x != 0.f) packed &= 0xffff0000u;
    if (kinds.y != 0.f) packed &= 0x0000ffffu;
    return ptx::pack<Element>(kinds.x, kinds.y);
  }
  static __device__ __forceinline__ float sum_of_kinds(float kinds) {
    if (kinds == 0.f) return 0.f;
    if (kinds >= kNaN) return infinity() - infinity();
    const bool has_minus = kinds >= kMinusInfinity, has_plus = static_cast<int>(kinds) % int(kMinusInfinity) != 0;
    return (has_plus ? infinity() : 0.f) - (has_minus ? infinity() : 0.f);
  }

  __device__ __forceinline__ bool has_finite_values(const unsigned char* s_values) const {
    ptx::FiniteTest<Element> finite;
#pragma unroll 1
    for (int i = lane(); i < kSliceKeys * Operand::kChunks; i += kWarpSize) {
      const uint4 chunk =
          *reinterpret_cast<const uint4*>(s_values + Operand::place(i / Operand::kChunks, i % Operand::kChunks));
      finite.add(chunk.x), finite.add(chunk.y), finite.add(chunk.z), finite.add(chunk.w);
    }
    return __all_sync(~0u, finite.all_finite());
  }

  const KernelParams& p_;
  uint32_t query_[kSteps][4];
  VisibleKeys visible_[2];
  Interval shared_;  // keys of the piece that all rows of the warp see
  OnlineSoftmax<kSliceKeys> softmax_;
  float out_[Config::kDim / 2];
};

}  // namespace selfattn::cuda::kv_cache
