// Where the single pass sums dQ: in float32 in global memory, a tile of kTileQuery rows behind the other. A tile lies
// as the lanes hold it, so that what a warp adds at once stands together. Rounded to dQ once all key tiles have added
// to it.
#pragma once
#include "params.cuh"
#include "products.cuh"
#include "ptx/reduce.cuh"

namespace selfattn::cuda::sm80 {

template <class Config>
struct DqAccumulator {
  static constexpr int kRowWarps = Config::kDqRowWarps, kColumnWarps = Config::kWarps / kRowWarps;
  static constexpr int kGroups = Config::kTileQuery / kRowWarps / 16;  // of 16 rows, of a warp
  static constexpr int kSteps = Config::kDimQk / kColumnWarps / 16;    // of 16 columns
  static constexpr int kLaneFloats = kGroups * kSteps * 8;
  static constexpr int kTileFloats = Config::kTileQuery * Config::kDimQk;
  static_assert(kTileFloats == kLaneFloats * Config::kThreads && kLaneFloats % 4 == 0);

  static __device__ __forceinline__ int warp_row() {
    return int(threadIdx.x) / kWarpSize / kColumnWarps * (16 * kGroups);
  }
  static __device__ __forceinline__ int column_warp() { return int(threadIdx.x) / kWarpSize % kColumnWarps; }

  // head: of those that the launch sums.
  static __device__ __forceinline__ float* tile_of(const BackwardKernelParams& p, int head, int block) {
    return p.dq_sums + (int64_t(head) * p.query_blocks + block) * kTileFloats;
  }
  // A lane's floats lie kReduceWidth at a time, kLaneStep apart.
  static constexpr int kLaneStep = kWarpSize * ptx::kReduceWidth;
  static __device__ __forceinline__ float* of_lane(float* g_tile) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    return g_tile + (warp * (kLaneFloats * kWarpSize) + lane * ptx::kReduceWidth);
  }

  static __device__ __forceinline__ void add(float* g_lane, const float (&dq)[kGroups][kSteps * 8]) {
#pragma unroll
    for (int i = 0; i < kLaneFloats / ptx::kReduceWidth; i++)
      ptx::reduce_add(g_lane + i * kLaneStep,
                      &dq[i * ptx::kReduceWidth / (kSteps * 8)][i * ptx::kReduceWidth % (kSteps * 8)]);
  }
};

// Sums to dQ: a thread block a tile.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    flash_attention_backward_postprocess_kernel(const __grid_constant__ BackwardKernelParams p) {
  using Dq = DqAccumulator<Config>;
  using Query = typename Config::Query;
  __shared__ __align__(128) unsigned char s_tile[Query::kBytes];
  const AttentionShape& shape = p.call.shape;
  const int head_of_launch = blockIdx.x / p.query_blocks, block = blockIdx.x % p.query_blocks;
  const int batch = p.first_batch + head_of_launch / shape.num_heads, head = head_of_launch % shape.num_heads;
  const float* g_lane = Dq::of_lane(Dq::tile_of(p, head_of_launch, block));
  const int lane = threadIdx.x % kWarpSize;
  float dq[Dq::kGroups][Dq::kSteps * 8];
#pragma unroll
  for (int i = 0; i < Dq::kLaneFloats / ptx::kReduceWidth; i++)
#pragma unroll
    for (int j = 0; j < ptx::kReduceWidth; j++) {
      const int at = i * ptx::kReduceWidth + j;
      dq[at / (Dq::kSteps * 8)][at % (Dq::kSteps * 8)] = g_lane[i * Dq::kLaneStep + j];
    }
#pragma unroll
  for (int g = 0; g < Dq::kGroups; g++)
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int group = 0; group < 2 * Dq::kSteps; group++)
        *reinterpret_cast<uint32_t*>(
            s_tile +
            Query::place(Dq::warp_row() + 16 * g + 8 * r + lane / 4, Dq::column_warp() * 2 * Dq::kSteps + group) +
            4 * (lane % 4)) = ptx::pack<typename Config::Element>(dq[g][4 * group + 2 * r] * p.call.scale,
                                                                  dq[g][4 * group + 2 * r + 1] * p.call.scale);
  __syncthreads();
  store_tile<Query, Config::kThreads>(s_tile, head_of(p.call.grad_q, batch, head), p.call.grad_q.stride_token,
                                      block * Config::kTileQuery, shape.query_length, shape.dim_qk);
}

}  // namespace selfattn::cuda::sm80
