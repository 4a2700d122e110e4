// What WarpRows is, for up to 8 rows a warp: most steps of a server have no more query heads than these for a kv head.
// The products are turned round, S^T = K Q^T and O^T = V^T P^T, so that the rows are the 8 columns of a tensor core's
// product: half the products, exponentials and registers that 16 rows would take.
#pragma once
#include <type_traits>

#include "ptx/transpose.cuh"
#include "rows.cuh"

namespace selfattn::cuda::kv_cache {

template <class Config>
class FewRows {
 public:
  using Element = typename Config::Element;
  using Operand = typename Config::Operand;
  using Query = typename Config::Query;
  static constexpr int kRows = Config::kWarpRows, kSteps = Config::kDim / 16, kSliceKeys = Config::kSliceKeys;
  static_assert(kRows == 8 && kSteps % 2 == 0);

  // s_p: the same as p, in shared memory.
  __device__ __forceinline__ FewRows(const KernelParams& p, const KernelParams& s_p)
      : p_(p), s_p_(s_p), c_(logit_scale(p) * kLog2E) {}

  // Of the 8 rows a lane has rows 2 * (lane % 4) and + 1.
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }
  static __device__ __forceinline__ int tile_row(int r) { return lane() % 4 * 2 + r; }

  // A piece.
  __device__ __forceinline__ void begin(const Walk& s_walk) {
    const int source_lanes[2] = {tile_row(0), tile_row(1)};
    visible_.begin(p_, s_p_, s_walk, lane() % kRows, source_lanes);
#pragma unroll
    for (int r = 0; r < 2; r++) max_[r] = -infinity(), sum_[r] = 0.f;
#pragma unroll
    for (int i = 0; i < Config::kDim / 4; i++) out_[i] = 0.f;
  }

  // Its queries.
  __device__ __forceinline__ void take_query(uint32_t s_query) {
#pragma unroll
    for (int pair = 0; pair < kSteps / 2; pair++)
      ptx::load_matrix_x4(s_query + Query::place(lane() % 8, pair * 4 + lane() / 8), query_ + 4 * pair);
  }

  // Takes in a slice that lies in shared memory, keys first.
  __device__ __forceinline__ void attend(const unsigned char* s_slot, int first_key) {
    const unsigned char* s_values = s_slot + Operand::kBytes;
    Scores scores;
    multiply_scores(ptx::shared_address(s_slot), scores);
    if (p_.call.softcap > 0.f) cap(scores);
    const bool is_cut = visible_.cuts(first_key, kSliceKeys);
    if (is_cut) mask(first_key, scores);
    exponentiate(scores);
    const uint32_t value_place = Operand::left_place(ptx::shared_address(s_values), 0);
    if (is_cut && !has_finite_values<Element, Operand>(s_values)) [[unlikely]]
      apart(out_, [&](auto& out) {
        apart(scores, [&](auto& weights) {
          multiply_non_finite_values_of_few_rows<Element, Operand>(value_place, weights, out);
        });
      });
    else
      multiply_values(value_place, scores);
  }

  // A row's stats by one of its lanes.
  __device__ __forceinline__ void leave_stats(SplitStats* s_stats) const {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float sum = over_lanes_of_row(sum_[r], [](float a, float b) { return a + b; });
      if (lane() / 4 == 0) s_stats[tile_row(r)] = {max_[r], sum};
    }
  }

  // For the merge, the tile's first `count` rows.
  __device__ __forceinline__ void leave_output(float* s_out, int count) const {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = ptx::forget(lane()) % 4 * 2 + r;  // what depends on it is wanted here alone
      if (row >= count) continue;
      const int first = place_of_output<Config>(row, ptx::forget(lane()) / 4);
#pragma unroll
      for (int eight = 0; eight < Config::kDim / 8; eight++) s_out[first ^ eight * 8] = out_[2 * eight + r];
    }
  }

 private:
  // Of keys 16 * i + lane / 4 and + 8 with the lane's two rows, which stand side by side.
  using Scores = float[kSliceKeys / 4];

  // The lanes of a row are four apart.
  template <class Combine>
  static __device__ __forceinline__ float over_lanes_of_row(float value, const Combine& combine) {
#pragma unroll
    for (int distance = 4; distance < kWarpSize; distance *= 2)
      value = combine(value, __shfl_xor_sync(~0u, value, distance));
    return value;
  }

  __device__ __forceinline__ void multiply_scores(uint32_t s_keys, Scores& scores) const {
    const uint32_t place = Operand::left_place(s_keys, 0);
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
#pragma unroll
      for (int tile = 0; tile < kSliceKeys / 16; tile++) {
        uint32_t a[4];
        Operand::load_left(place + tile * 16 * sm80::kPanelRowBytes, step, a);
        const uint32_t* b = query_ + 2 * step;
        if (step == 0)
          ptx::multiply_overwrite<Element>(scores + 4 * tile, a, b[0], b[1]);
        else
          ptx::multiply<Element>(scores + 4 * tile, a, b[0], b[1]);
      }
    }
  }

  __device__ __forceinline__ void cap(Scores& scores) const {
    constexpr int kLeast = 8;  // that Softcap takes
    float padded[kSliceKeys / 4 < kLeast ? kLeast : kSliceKeys / 4] = {};
#pragma unroll
    for (int i = 0; i < kSliceKeys / 4; i++) padded[i] = scores[i];
    apart(padded, [&](auto& copy) { apply_softcap(s_p_.softcap, copy); });
#pragma unroll
    for (int i = 0; i < kSliceKeys / 4; i++) scores[i] = padded[i];
  }

  __device__ __forceinline__ void mask(int first_key, Scores& scores) const {
    const int first = first_key + ptx::forget(lane()) / 4;
#pragma unroll
    for (int i = 0; i < kSliceKeys / 4; i++)
      if (!visible_.sees(i % 2, first + i / 2 * 8)) scores[i] = -infinity();
  }

  // As OnlineSoftmax (flash/tile/online_softmax.cuh), with the maximum taken off the scores of large rows.
  __device__ __forceinline__ void exponentiate(Scores& scores) {
    float correction[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float top = scores[r];
#pragma unroll
      for (int i = 2 + r; i < kSliceKeys / 4; i += 2) top = fmaxf(top, scores[i]);
      top = fmaxf(max_[r], over_lanes_of_row(top, [](float a, float b) { return fmaxf(a, b); }));
      const float base = top == -infinity() ? 0.f : top;
      correction[r] = ptx::exp2_approx((max_[r] - base) * c_);
      max_[r] = top;
      float offset = base * c_, sum = 0.f;
      if (fabsf(offset) >= kExactFrom) {
        offset = 0.f;
#pragma unroll
        for (int i = r; i < kSliceKeys / 4; i += 2) scores[i] -= base;
      }
#pragma unroll
      for (int i = r; i < kSliceKeys / 4; i += 2) {
        scores[i] = ptx::exp2_approx(scores[i] * c_ - offset);
        sum += scores[i];
      }
      sum_[r] = sum_[r] * correction[r] + sum;
    }
    if (__all_sync(~0u, correction[0] == 1.f && correction[1] == 1.f)) return;
#pragma unroll
    for (int i = 0; i < Config::kDim / 4; i++) out_[i] *= correction[i % 2];
  }

  __device__ __forceinline__ void multiply_values(uint32_t s_values, const Scores& weights) {
#pragma unroll
    for (int step = 0; step < kSliceKeys / 16; step++) {
      uint32_t b[2];
      take_weights<Element>(weights + 4 * step, b);
#pragma unroll
      for (int tile = 0; tile < Config::kDim / 16; tile++) {
        uint32_t r[4];
        Operand::load_right_transposed(s_values, step, tile, r);
        const uint32_t a[4] = {r[0], r[2], r[1], r[3]};
        ptx::multiply<Element>(out_ + 4 * tile, a, b[0], b[1]);
      }
    }
  }

  const KernelParams &p_, &s_p_;
  float c_;  // scale * log2(e)
  uint32_t query_[2 * kSteps];
  VisibleOfLane visible_;
  float max_[2], sum_[2];        // of the lane's rows; of its keys
  float out_[Config::kDim / 4];  // columns 8 * i + lane / 4 of the two rows
};

template <class Config>
using RowsOf = std::conditional_t<Config::kWarpRows == 8, FewRows<Config>, WarpRows<Config>>;

}  // namespace selfattn::cuda::kv_cache
