// qk_norm_rope for what has no vector kernel: head dimensions of any size up to kMaxNormRopeDim, odd ones without
// rotation, and heads of which the first part alone rotates. A block takes a token at a time and makes its rotations
// once; a warp takes a head at a time and reads it twice.
#pragma once
#include "lane.cuh"

namespace selfattn::cuda {

constexpr int kGeneralWarps = 4, kGeneralThreads = kGeneralWarps * kWarpSize;

// Where the elements of a head's pairs stand. An odd dimension's last pair lacks its second element. Those that do not
// rotate are neighbours in both pairings.
template <bool kIsPartial>
struct PairOrder {
  int dim, rotary_dim;
  bool is_interleaved;

  __device__ __forceinline__ int pairs() const { return (dim + 1) / 2; }
  __device__ __forceinline__ bool is_rotated(int pair) const { return pair < rotary_dim / 2; }
  __device__ __forceinline__ int first(int pair) const {
    if constexpr (kIsPartial) return is_interleaved || !is_rotated(pair) ? 2 * pair : pair;
    return is_interleaved ? 2 * pair : pair;
  }
  __device__ __forceinline__ int second(int pair) const {
    if constexpr (kIsPartial) return is_interleaved || !is_rotated(pair) ? 2 * pair + 1 : pair + rotary_dim / 2;
    return is_interleaved ? 2 * pair + 1 : pair + dim / 2;
  }

  template <class Element>
  __device__ __forceinline__ float2 load(const Element* g_head, int pair) const {
    const int second_index = second(pair);
    return make_float2(static_cast<float>(g_head[first(pair)]),
                       second_index < dim ? static_cast<float>(g_head[second_index]) : 0.0f);
  }

  template <class Element>
  __device__ __forceinline__ void store(Element* g_head, int pair, float2 value) const {
    g_head[first(pair)] = static_cast<Element>(value.x);
    if (second(pair) < dim) g_head[second(pair)] = static_cast<Element>(value.y);
  }

  __device__ __forceinline__ float2 load_weight(const NormRopeSide& side, int pair) const {
    if (!side.weight) return make_float2(1.0f, 1.0f);
    const int second_index = second(pair);
    return make_float2(load_float(side.weight, side.weight_type, first(pair)),
                       second_index < dim ? load_float(side.weight, side.weight_type, second_index) : 0.0f);
  }
};

__device__ __forceinline__ float2 rotated(float2 x, Rotation rotation) {
  return make_float2(x.x * rotation.cos - x.y * rotation.sin, x.x * rotation.sin + x.y * rotation.cos);
}

template <class Element, bool kIsBackward, bool kIsPartial>
__global__ void __launch_bounds__(kGeneralThreads)
    qk_norm_rope_general_kernel(const __grid_constant__ NormRopeParams p) {
  extern __shared__ float s_memory[];
  Rotation* const s_rotations = reinterpret_cast<Rotation*>(s_memory);  // (dim / 2)
  float* const s_sums = s_memory + (p.dim + 1) / 2 * 2;                 // (warps, dim), backward
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const bool is_first = static_cast<int>(blockIdx.x) < p.sides[0].blocks;
  const NormRopeSide& side = p.sides[is_first ? 0 : 1];
  const int block = is_first ? blockIdx.x : blockIdx.x - p.sides[0].blocks;
  const PairOrder<kIsPartial> order{p.dim, p.rotary_dim, !p.pairs_halves || !p.has_rope};
  float* const s_warp_sums = s_sums + warp * p.dim;
  if constexpr (kIsBackward) {
    for (int column = lane; column < p.dim; column += kWarpSize) s_warp_sums[column] = 0.0f;
    __syncwarp();
  }

  const int tokens = side.batch * side.length;
  for (int index = block; index < tokens; index += side.blocks) {
    const int batch = index / side.length, token = index - batch * side.length;
    if (p.has_rope) {
      __syncthreads();  // the token before is done with its rotations
      const double position = side.angles.sin ? 0.0 : position_of(side.angles, batch, token);
      for (int pair = threadIdx.x; pair < (kIsPartial ? p.rotary_dim : p.dim) / 2; pair += kGeneralThreads) {
        constexpr double kQuarterTurns = 0.63661977236758134308;  // in a radian
        Rotation rotation = side.angles.sin
                                ? table_rotation(side.angles, batch, token, pair)
                                : rotation_of(position * (pow(p.theta, -2.0 * pair / p.dim) * kQuarterTurns));
        if (p.rotates_back || kIsBackward) rotation.sin = -rotation.sin;
        s_rotations[pair] = rotation;
      }
      __syncthreads();
    }
    for (int head = warp; head < side.heads; head += kGeneralWarps) {
      const Element* const g_input = token_of<Element>(side.input, batch, token) + head * side.input.stride_head;
      Element* const g_result =
          static_cast<Element*>(side.result) + (static_cast<int64_t>(index) * side.heads + head) * p.dim;
      const Element* g_grad = nullptr;
      if constexpr (kIsBackward) g_grad = token_of<Element>(side.grad, batch, token) + head * side.grad.stride_head;
      float squares = 0.0f, product = 0.0f;  // sums of x^2 and of g w x
      for (int pair = lane; p.has_norm && pair < order.pairs(); pair += kWarpSize) {
        const float2 x = order.load(g_input, pair);
        squares += x.x * x.x + x.y * x.y;
        if constexpr (kIsBackward) {
          float2 grad = order.load(g_grad, pair);
          if (p.has_rope && (!kIsPartial || order.is_rotated(pair))) grad = rotated(grad, s_rotations[pair]);
          const float2 weight = order.load_weight(side, pair);
          product += grad.x * weight.x * x.x + grad.y * weight.y * x.y;
        }
      }
      const float rstd =
          p.has_norm ? rsqrtf(sum_of_head<kWarpSize>(squares) / static_cast<float>(p.dim) + p.eps) : 1.0f;
      const float along = sum_of_head<kWarpSize>(product) * rstd / static_cast<float>(p.dim);  // mean of g w n
      for (int pair = lane; pair < order.pairs(); pair += kWarpSize) {
        const float2 x = order.load(g_input, pair);
        const float2 weight = order.load_weight(side, pair);
        const float2 normed = make_float2(x.x * rstd, x.y * rstd);
        if constexpr (kIsBackward) {
          float2 grad = order.load(g_grad, pair);
          if (p.has_rope && (!kIsPartial || order.is_rotated(pair))) grad = rotated(grad, s_rotations[pair]);
          s_warp_sums[order.first(pair)] += grad.x * normed.x;
          if (order.second(pair) < p.dim) s_warp_sums[order.second(pair)] += grad.y * normed.y;
          order.store(g_result, pair,
                      make_float2(rstd * (grad.x * weight.x - normed.x * along),
                                  rstd * (grad.y * weight.y - normed.y * along)));
        } else {
          float2 result = make_float2(normed.x * weight.x, normed.y * weight.y);
          if (p.has_rope && (!kIsPartial || order.is_rotated(pair))) result = rotated(result, s_rotations[pair]);
          order.store(g_result, pair, result);
        }
      }
    }
  }
  if constexpr (kIsBackward) {
    __syncthreads();
    for (int column = threadIdx.x; side.partial_sums && column < p.dim; column += kGeneralThreads) {
      float sum = 0.0f;
      for (int row = 0; row < kGeneralWarps; row++) sum += s_sums[row * p.dim + column];
      side.partial_sums[static_cast<int64_t>(block) * p.dim + column] = sum;
    }
  }
}

}  // namespace selfattn::cuda
