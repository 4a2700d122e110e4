// Softmax over key blocks with softcap, as the forward pass does it.
//
// Of a score no tanh is made. Once a row's maximum is known, one polynomial gives the exponent of P, the logit less the
// maximum in units of log2, and as it stands among the exponentials it runs while they are waited for: exp2 is done for
// a warp once in 8 clocks, and what else an exponential takes leaves 4 to 5 of these free. tanh is monotone, so the
// maximum is looked for before it.
//
// Scores become *codes*, whose order is that of the logits, and masks set codes to -inf:
//   - y = x / cap / kUnit as it is (softcap.cuh), where |y| < 2, which is |x / cap| < 3/4: exponents are a polynomial.
//   - 4 tanh(x / cap), which is 2.54 and more, where it is larger: exponents are a multiple.
// A code, and what is made of it, depends on its own score alone: what other scores a warp meets decides only which of
// two ways it goes, and both give the same bits.
#pragma once
#include "online_softmax.cuh"
#include "ptx/arithmetic.cuh"
#include "softcap.cuh"

namespace selfattn::cuda {

// Made on the host.
struct SoftcapExponent : Softcap {
  float of_large;         // of a large code, for its exponent
  float coefficients[5];  // of y, y^3, .. in the exponent of a small one

  static SoftcapExponent of(float scale, float cap) {
    const Softcap base = Softcap::of(scale, cap);
    const auto times = [&](float k) { return static_cast<float>(static_cast<double>(k) * kLog2E * cap); };
    return {base, times(1 / kCodeOfOne), {times(kUnit), times(k1), times(k2), times(k3), times(k4)}};
  }

  // By a whole warp: scores become codes. Returns, to all lanes, whether some are large.
  template <int kCount>
  __device__ __forceinline__ bool encode(float (&scores)[kCount]) const {
    uint32_t bits[4] = {};  // independent chains
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      scores[i] *= factor;
      bits[i / 2 % 4] |= __float_as_uint(scores[i]);
    }
    const bool has_large = __any_sync(~0u, (bits[0] | bits[1] | bits[2] | bits[3]) & kBitOfLarge);
    if (has_large) [[unlikely]]
      for_each_group(scores, [](float (&group)[kGroup]) {
#pragma unroll
        for (int i = 0; i < kGroup; i++)
          if (!(fabsf(group[i]) < kFirstLarge)) group[i] = kCodeOfOne * tanh_of_large(group[i]);
      });
    return has_large;
  }

  __device__ __forceinline__ float exponent_of_small(float code, float offset) const {
    return fmaf(code, slope(code), -offset);
  }
  __device__ __forceinline__ float exponent(float code, float offset) const {
    const float of_small = slope(code);
    return fmaf(code, fabsf(code) < kFirstLarge ? of_small : of_large, -offset);
  }
  // As Softcap::apply gives it.
  static __device__ __forceinline__ float tanh(float code) {
    return fabsf(code) < kFirstLarge ? tanh_of_small(code) : code * (1 / kCodeOfOne);
  }

  // Values go round in a loop, in groups of two rows' four columns: unrolled, what is seldom wanted is more code than
  // all the rest of a step, for the step to jump over.
  static constexpr int kGroup = 8;
  template <int kCount, class Change>
  static __device__ __forceinline__ void for_each_group(float (&values)[kCount], const Change& change) {
    static_assert(kCount % kGroup == 0);
#pragma unroll 1
    for (int first = 0; first < kCount; first += kGroup) {
      float group[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; i++) group[i] = values[i];
      change(group);
#pragma unroll
      for (int i = 0; i < kCount; i++) values[i] = i < kCount - kGroup ? values[i + kGroup] : group[i % kGroup];
    }
  }

 private:
  static constexpr float kCodeOfOne = 4.f;  // a power of 2: nothing is rounded

  __device__ __forceinline__ float slope(float y) const {
    const float square = y * y;
    float p = fmaf(square, coefficients[4], coefficients[3]);
#pragma unroll
    for (int i = 2; i >= 0; i--) p = fmaf(p, square, coefficients[i]);
    return p;
  }
};

// The steps are those of OnlineSoftmax, on codes. state.max is a code.
template <int kTileKey>
struct CappedSoftmax : OnlineSoftmax<kTileKey> {
  using Base = OnlineSoftmax<kTileKey>;
  using Base::block_sum_, Base::correction, Base::offset_, Base::state;

  __device__ __forceinline__ CappedSoftmax() { offset_[0] = offset_[1] = 0.f; }

  __device__ __forceinline__ void encode(const SoftcapExponent& cap, float (&s)[kTileKey / 2]) {
    has_large_ = cap.encode(s);
  }

  template <bool kIsFirst>
  __device__ __forceinline__ void take_max(const SoftcapExponent& cap, const float (&s)[kTileKey / 2]) {
    float partial[8];
    Base::take_lane_max(s, partial);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float top = Base::max_of_row(partial, r);
      if (!kIsFirst) top = fmaxf(top, state.max[r]);
      const float offset = cap.exponent(top == -infinity() ? 0.f : top, 0.f);
      const float fall = state.max[r] == -infinity() ? -infinity() : offset_[r] - offset;
      correction[r] = kIsFirst ? 1.f : ptx::exp2_approx(fall);
      state.max[r] = top;
      offset_[r] = offset;
      block_sum_[2 * r] = block_sum_[2 * r + 1] = 0.f;
    }
  }

  // Whether exponentiate must not be used for this block, but exponentiate_any.
  __device__ __forceinline__ bool has_large() const { return has_large_; }

  // Codes become P in groups of 8 columns kFrom .. kTo - 1.
  template <int kFrom, int kTo>
  __device__ __forceinline__ void exponentiate(const SoftcapExponent& cap, float (&s)[kTileKey / 2]) {
#pragma unroll
    for (int i = 4 * kFrom; i < 4 * kTo; i++) add_weight(i, s[i], cap.exponent_of_small(s[i], offset_[i / 2 % 2]));
  }

  // The same of any codes in all columns, by less code and in more time. kIsExact: for rows whose maximum is large.
  template <bool kIsExact>
  __device__ __forceinline__ void exponentiate_any(const SoftcapExponent& cap, float (&s)[kTileKey / 2]) {
    SoftcapExponent::for_each_group(s, [&](float (&group)[SoftcapExponent::kGroup]) {
#pragma unroll
      for (int i = 0; i < SoftcapExponent::kGroup; i++) {
        const float offset = offset_[i / 2 % 2];
        float exponent = cap.exponent(group[i], offset);
        // The largest logit's is then 0; the fused one is what its product was rounded by.
        if (kIsExact && !(fabsf(offset) < kExactFrom)) exponent = cap.exponent(group[i], 0.f) - offset;
        add_weight(i, group[i], exponent);
      }
    });
  }

  // What the largest logit of a row is `cap` times of.
  __device__ __forceinline__ float max_score(int r) const { return SoftcapExponent::tanh(state.max[r]); }

 private:
  __device__ __forceinline__ void add_weight(int i, float& p, float exponent) {
    p = ptx::exp2_approx(exponent);
    block_sum_[i / 2 % 2 * 2 + i % 2] += p;
  }

  bool has_large_;  // the same in all lanes
};

}  // namespace selfattn::cuda
