// qk_norm_rope, forward, vector kernel. A block works on q or on k; a warp takes a token at a time, makes its rotations
// once, and goes through its heads: kForwardPasses loads of kRows heads are in flight before the first one is used.
#pragma once
#include "lane.cuh"

namespace selfattn::cuda {

// One token's heads, by a warp; head_of_result(head): where a head goes.
template <class Config, class HeadOfResult>
__device__ __forceinline__ void normalise_and_rotate(const NormRopeParams& p, const NormRopeSide& side,
                                                     const LanePlace<Config>& place,
                                                     const LaneRotations<Config>& source,
                                                     const SharedWeight<Config>& s_weight, const WarpTokens& tokens,
                                                     float inverse_dim, const HeadOfResult& head_of_result) {
  using Element = typename Config::Element;
  constexpr int kRows = Config::kRows, kPasses = Config::kForwardPasses;
  const Element* const g_input = token_of<Element>(side.input, tokens.batch, tokens.token);
  Pairs rotations;
  for (int first_head = 0; first_head < side.heads; first_head += kPasses * kRows) {
    RawPairs<Element> raw[kPasses];
#pragma unroll
    for (int pass = 0; pass < kPasses; pass++) {
      const int head = first_head + pass * kRows + place.row;
      raw[pass] = place.load(g_input + head * side.input.stride_head, place.is_active && head < side.heads);
    }
    if (p.has_rope && first_head == 0) {
      source.make(tokens.batch, tokens.token);
      rotations = source.of_lane(place);
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; pass++) {
      if (first_head + pass * kRows >= side.heads) break;
      Pairs x = place.unpack(raw[pass]);
      if (p.has_norm) {
        const float rstd = rsqrtf(sum_of_head<Config::kLanes>(dot(x, x)) * inverse_dim + p.eps);
        const Pairs weight = s_weight.of_lane(place.column);
#pragma unroll
        for (int i = 0; i < kLanePairs; i++) {
          x.first[i] *= rstd * weight.first[i];
          x.second[i] *= rstd * weight.second[i];
        }
      }
      if (p.has_rope) rotate</*kBack=*/false>(x, rotations);
      const int head = first_head + pass * kRows + place.row;
      if (place.is_active && head < side.heads) place.store(head_of_result(head), x);
    }
  }
}

template <class Config>
__global__ void __launch_bounds__(kVectorThreads, Config::kMinBlocks)
    qk_norm_rope_forward_kernel(const __grid_constant__ NormRopeParams p) {
  using Element = typename Config::Element;
  __shared__ __align__(16) float s_rotations[kVectorWarps][Config::kMaxDim];
  __shared__ __align__(16) SharedWeight<Config> s_weight;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const bool is_first = static_cast<int>(blockIdx.x) < p.sides[0].blocks;
  const NormRopeSide& side = p.sides[is_first ? 0 : 1];
  const LanePlace<Config> place(lane, p.dim);
  const LaneRotations<Config> source(p, side.angles, s_rotations[warp], lane);
  s_weight.fill(side, p.dim);
  __syncthreads();
  const float inverse_dim = 1.0f / static_cast<float>(p.dim);

  WarpTokens tokens(p, side, is_first ? blockIdx.x : blockIdx.x - p.sides[0].blocks);
  for (; tokens.find(); tokens.advance()) {
    Element* const g_result =
        static_cast<Element*>(side.result) + static_cast<int64_t>(tokens.index) * side.heads * p.dim;
    normalise_and_rotate<Config>(p, side, place, source, s_weight, tokens, inverse_dim,
                                 [&](int head) { return g_result + static_cast<int64_t>(head) * p.dim; });
  }
}

}  // namespace selfattn::cuda
