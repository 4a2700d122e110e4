// The gradient of qk_norm_rope with its norm, vector kernel; cut as the forward kernel is. With x the raw head, r =
// 1 / sqrt(mean(x^2) + eps), n = x r, g the gradient rotated back: dweight = sum of g n over tokens and heads,
// dx = r (g w - n mean(g w n)). The weight's gradient is summed in registers, then over the block, which leaves one row
// of partial sums; a second kernel adds the rows in their order.
#pragma once
#include "lane.cuh"
#include "ptx/launch.cuh"

namespace selfattn::cuda {

// The block's sum of its lanes' sums -> g_row (dim,).
template <class Config>
__device__ __forceinline__ void store_block_sum(Pairs& sums, const LanePlace<Config>& place, int dim,
                                                float (*s_rows)[Config::kMaxDim], float* g_row) {
  const int warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int i = 0; i < kLanePairs; i++) {
#pragma unroll
    for (int distance = kWarpSize / 2; distance >= Config::kLanes; distance /= 2) {
      sums.first[i] += __shfl_xor_sync(0xffffffffu, sums.first[i], distance);
      sums.second[i] += __shfl_xor_sync(0xffffffffu, sums.second[i], distance);
    }
  }
  if (place.row == 0 && place.is_active) {
    float lows[kChunk], highs[kChunk];
    from_pairs<Config::kPairsHalves>(sums, lows, highs);
#pragma unroll
    for (int i = 0; i < kChunk; i++) {
      s_rows[warp][place.low + i] = lows[i];
      s_rows[warp][place.high + i] = highs[i];
    }
  }
  __syncthreads();
  for (int column = threadIdx.x; column < dim; column += kVectorThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int row = 0; row < kVectorWarps; row++) sum += s_rows[row][column];
    g_row[column] = sum;
  }
}

template <class Config>
__global__ void __launch_bounds__(kVectorThreads, Config::kMinBlocks)
    qk_norm_rope_backward_kernel(const __grid_constant__ NormRopeParams p) {
  using Element = typename Config::Element;
  constexpr int kRows = Config::kRows, kPasses = Config::kBackwardPasses;
  __shared__ __align__(16) float s_rotations[kVectorWarps][Config::kMaxDim];  // at the end: the warps' sums
  __shared__ __align__(16) SharedWeight<Config> s_weight;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const bool is_first = static_cast<int>(blockIdx.x) < p.sides[0].blocks;
  const NormRopeSide& side = p.sides[is_first ? 0 : 1];
  const int block = is_first ? blockIdx.x : blockIdx.x - p.sides[0].blocks;
  const LanePlace<Config> place(lane, p.dim);
  const LaneRotations<Config> source(p, side.angles, s_rotations[warp], lane);
  s_weight.fill(side, p.dim);
  __syncthreads();
  const float inverse_dim = 1.0f / static_cast<float>(p.dim);
  Pairs sums = {};

  WarpTokens tokens(p, side, block);
  for (; tokens.find(); tokens.advance()) {
    const Element* const g_input = token_of<Element>(side.input, tokens.batch, tokens.token);
    const Element* const g_grad = token_of<Element>(side.grad, tokens.batch, tokens.token);
    Element* const g_result =
        static_cast<Element*>(side.result) + static_cast<int64_t>(tokens.index) * side.heads * p.dim;
    for (int first_head = 0; first_head < side.heads; first_head += kPasses * kRows) {
      RawPairs<Element> raw[kPasses], raw_grad[kPasses];
#pragma unroll
      for (int pass = 0; pass < kPasses; pass++) {
        const int head = first_head + pass * kRows + place.row;
        const bool is_there = place.is_active && head < side.heads;
        raw[pass] = place.load(g_input + head * side.input.stride_head, is_there);
        raw_grad[pass] = place.load(g_grad + head * side.grad.stride_head, is_there);
      }
      if (p.has_rope && first_head == 0) source.make(tokens.batch, tokens.token);
#pragma unroll
      for (int pass = 0; pass < kPasses; pass++) {
        if (first_head + pass * kRows >= side.heads) break;
        Pairs normed = place.unpack(raw[pass]), grad = place.unpack(raw_grad[pass]);
        const int head = first_head + pass * kRows + place.row;
        const float mean_square = sum_of_head<Config::kLanes>(dot(normed, normed)) * inverse_dim;
        // A head that is not there must not bring 0 / 0 into the weight's gradient.
        const float rstd = head < side.heads ? rsqrtf(mean_square + p.eps) : 0.0f;
        if (p.has_rope) rotate</*kBack=*/true>(grad, source.of_lane(place));
        const Pairs weight = s_weight.of_lane(place.column);
#pragma unroll
        for (int i = 0; i < kLanePairs; i++) {
          normed.first[i] *= rstd;
          normed.second[i] *= rstd;
          sums.first[i] += grad.first[i] * normed.first[i];
          sums.second[i] += grad.second[i] * normed.second[i];
          grad.first[i] *= weight.first[i];
          grad.second[i] *= weight.second[i];
        }
        const float along = sum_of_head<Config::kLanes>(dot(grad, normed)) * inverse_dim;
#pragma unroll
        for (int i = 0; i < kLanePairs; i++) {
          grad.first[i] = rstd * (grad.first[i] - normed.first[i] * along);
          grad.second[i] = rstd * (grad.second[i] - normed.second[i] * along);
        }
        if (place.is_active && head < side.heads) place.store(g_result + static_cast<int64_t>(head) * p.dim, grad);
      }
    }
  }
  ptx::launch_dependents();  // the kernel that adds the rows may be brought up: it waits for this one's end
  if (side.partial_sums) {
    __syncwarp();
    store_block_sum(sums, place, p.dim, s_rotations, side.partial_sums + static_cast<int64_t>(block) * p.dim);
  }
}

}  // namespace selfattn::cuda
