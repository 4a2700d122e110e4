// Plain values that travel from the binding of qk_norm_rope (which knows tensors) to its launchers (which know no torch
// header).
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace selfattn::cuda {

enum class FloatType { kFloat, kBFloat16, kHalf };
enum class PositionType { kInt32, kInt64, kDouble };

// A (batch, tokens, heads, dim) tensor: any strides (in elements), dim contiguous. Where the dimension has a vector
// kernel, data and strides are multiples of 16 bytes.
struct HeadsView {
  const void* data;
  int64_t stride_batch, stride_token, stride_head;
};

// Tables, or positions, or neither: positions 0 .. length - 1. A batch stride is 0 where all rows share them.
struct AngleSource {
  const void *sin, *cos;  // (batch, tokens, rotary_dim / 2), or null
  FloatType table_type;
  int64_t table_stride_batch, table_stride_token, table_stride_pair;
  const void* positions;  // (batch, tokens), or null
  PositionType position_type;
  int64_t position_stride_batch, position_stride_token;
};

// One of q and k.
struct NormRopeSide {
  int batch, length, heads;
  HeadsView input;     // forward, and backward with the norm
  HeadsView grad;      // backward
  void* result;        // (batch, length, heads, dim), contiguous
  const void* weight;  // (dim,), or null: ones
  FloatType weight_type;
  AngleSource angles;
  float* partial_sums;    // (blocks, dim) scratch of the weight's gradient; null without a weight
  void* weight_gradient;  // (dim,) of weight_type
  int blocks;             // thread blocks that work on it: schedule_qk_norm_rope
};

constexpr int kVectorWarps = 8;     // of a thread block of a vector kernel
constexpr int kMaxVectorDim = 256;  // vector kernels: multiples of 16 up to this
constexpr int kMaxNormRopeDim = 1024;

struct NormRopeParams {
  NormRopeSide sides[2];
  int num_sides;
  int dim;
  FloatType element;
  bool has_norm, has_rope, pairs_halves;
  bool rotates_back;  // the transposed rotation: the gradient of a call without norm is a forward call with this
  float eps;
  double theta;
  double quarter_turns[kMaxVectorDim / 2];  // of one step of the position, per pair; vector kernels
  int tokens_per_warp;                      // per block, for the general kernels: schedule_qk_norm_rope
  int rotary_dim;                           // the first elements of a head, those that rotate; dim without rotation
};

constexpr bool has_vector_kernel(int64_t dim) { return dim % 16 == 0 && dim > 0 && dim <= kMaxVectorDim; }
// Vector kernels rotate whole heads.
constexpr bool takes_vector_kernel(const NormRopeParams& params) {
  return has_vector_kernel(params.dim) && params.rotary_dim == params.dim;
}

// Whether this build holds the kernels for the device.
bool qk_norm_rope_runs_on(int device);

// Cuts the work into thread blocks: fills in `blocks` and `tokens_per_warp`.
cudaError_t schedule_qk_norm_rope(NormRopeParams& params, bool is_backward);

// Forward: result = input, normalised and rotated. Backward, with has_norm only: result = the gradient of input, and
// weight_gradient. Gives the launch status.
cudaError_t launch_qk_norm_rope(const NormRopeParams& params, bool is_backward, cudaStream_t stream);

}  // namespace selfattn::cuda
