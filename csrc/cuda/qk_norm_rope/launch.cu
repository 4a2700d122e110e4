// The launches of qk_norm_rope: cutting the work, choosing the kernel, and the second stage of the weights' gradients.
#include "host/device.h"
#include "params.h"
#include "ptx/launch.cuh"
#include "rotation.cuh"

namespace selfattn::cuda {

// Of one element type: launch.cuh, compiled by the files in instantiations/.
template <class Element>
cudaError_t launch_kernels(const NormRopeParams& params, bool is_backward, cudaStream_t stream);

namespace {

// Thread blocks per SM: many, so that it evens out who gets memory when; fewer where each leaves a row of
// partial sums.
constexpr int kForwardBlocks = 16, kBackwardBlocks = 8;

constexpr int kSumColumns = 32, kSumSlices = 32;

struct WeightSums {
  const float* partial_sums;  // (rows, dim)
  void* weight_gradient;      // (dim,)
  FloatType type;
  int rows;
};

struct WeightSumParams {
  WeightSums sides[2];
  int dim;
};

// Adds up each column in an order that depends on the number of rows alone. blockIdx: (columns / 32, side).
__global__ void __launch_bounds__(kSumColumns* kSumSlices)
    sum_weight_gradients_kernel(const __grid_constant__ WeightSumParams p) {
  __shared__ float s_slices[kSumSlices][kSumColumns + 1];
  const WeightSums& side = p.sides[blockIdx.y];
  const int column = blockIdx.x * kSumColumns + threadIdx.x;
  ptx::wait_for_previous_kernel();
  float sum = 0.0f;
  if (column < p.dim) {
#pragma unroll 8
    for (int row = threadIdx.y; row < side.rows; row += kSumSlices) {
      sum += side.partial_sums[static_cast<int64_t>(row) * p.dim + column];
    }
  }
  s_slices[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  // Now a warp per column, a lane per slice.
  float total = s_slices[threadIdx.x][threadIdx.y];
#pragma unroll
  for (int distance = kSumSlices / 2; distance > 0; distance /= 2) {
    total += __shfl_xor_sync(0xffffffffu, total, distance);
  }
  const int result_column = blockIdx.x * kSumColumns + threadIdx.y;
  if (threadIdx.x == 0 && result_column < p.dim) store_float(side.weight_gradient, side.type, result_column, total);
}

cudaError_t launch_sum_weight_gradients(const NormRopeParams& params, cudaStream_t stream) {
  WeightSumParams sums{};
  sums.dim = params.dim;
  int sides = 0;
  for (int i = 0; i < params.num_sides; i++) {
    const NormRopeSide& side = params.sides[i];
    if (!side.weight_gradient) continue;
    sums.sides[sides++] = {side.partial_sums, side.weight_gradient, side.weight_type, side.blocks};
  }
  if (sides == 0) return cudaSuccess;
  int device = 0, sms = 0;
  if (const cudaError_t status = find_device(device, sms)) return status;
  cudaLaunchAttribute early_start = dependent_launch();
  cudaLaunchConfig_t config{};
  config.gridDim = dim3((params.dim + kSumColumns - 1) / kSumColumns, sides);
  config.blockDim = dim3(kSumColumns, kSumSlices);
  config.stream = stream;
  config.attrs = &early_start;
  config.numAttrs = has_dependent_launch<sum_weight_gradients_kernel>(device) ? 1 : 0;
  return cudaLaunchKernelEx(&config, sum_weight_gradients_kernel, sums);
}

}  // namespace

cudaError_t schedule_qk_norm_rope(NormRopeParams& params, bool is_backward) {
  int device = 0, sms = 0;
  if (const cudaError_t status = find_device(device, sms)) return status;
  const int most_blocks = sms * (is_backward ? kBackwardBlocks : kForwardBlocks);
  const bool is_vector = takes_vector_kernel(params);
  const int warps = is_vector ? kVectorWarps : 1;  // a block of the general kernel takes one token at a time
  int64_t tokens[2] = {0, 0};
  for (int i = 0; i < params.num_sides; i++) {
    const NormRopeSide& side = params.sides[i];
    tokens[i] = side.heads > 0 ? static_cast<int64_t>(side.batch) * side.length : 0;
  }
  const int64_t slots = static_cast<int64_t>(most_blocks) * warps;
  params.tokens_per_warp = static_cast<int>((tokens[0] + tokens[1] + slots - 1) / slots);
  if (params.tokens_per_warp == 0) params.tokens_per_warp = 1;
  for (int i = 0; i < params.num_sides; i++) {
    const int64_t tokens_of_block = static_cast<int64_t>(warps) * params.tokens_per_warp;
    params.sides[i].blocks = static_cast<int>((tokens[i] + tokens_of_block - 1) / tokens_of_block);
  }
  return cudaSuccess;
}

bool qk_norm_rope_runs_on(int device) { return is_built_for<sum_weight_gradients_kernel>(device); }

cudaError_t launch_qk_norm_rope(const NormRopeParams& params, bool is_backward, cudaStream_t stream) {
  const auto launch = params.element == FloatType::kBFloat16 ? launch_kernels<__nv_bfloat16>
                      : params.element == FloatType::kHalf   ? launch_kernels<__half>
                                                             : launch_kernels<float>;
  const cudaError_t status = launch(params, is_backward, stream);
  return is_backward && status == cudaSuccess ? launch_sum_weight_gradients(params, stream) : status;
}

}  // namespace selfattn::cuda
