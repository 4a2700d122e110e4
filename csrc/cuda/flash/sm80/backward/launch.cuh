// Gradients of exact attention for every card since Ampere: dQ, dK, dV of O = softmax(scale * Q K^T) V. Host side of
// one pair of head dimensions and element type: params -> schedules -> launches. Two forms, ahead of both of which
//
//   preprocess  takes the statistics of the rows of queries.
//
// The single pass multiplies S and dP once, five products, and adds dQ up in global memory. Rows that are not aligned,
// which are rare, have no kernel of it: it would take a third of the time and bytes of theirs.
//   single pass  a thread block a key tile
//   postprocess  rounds the sums of dQ
// The two passes keep every sum in registers and add it up in one order, so their gradients are bitwise equal from call
// to call. They multiply S and dP twice, seven products, and need less shared memory:
//   dq          a thread block a query tile
//   dkdv        a thread block a key tile
#pragma once
#include <algorithm>

#include "dkdv_kernel.cuh"
#include "dq_accumulator.cuh"
#include "dq_kernel.cuh"
#include "flash/tile/element.h"
#include "flash/tile/make_schedule.h"
#include "host/device.h"
#include "launcher.h"
#include "preprocess.cuh"
#include "single_pass_kernel.cuh"
#include "workspace.h"

namespace selfattn::cuda::sm80 {

// Tiles of heads that are worked on together: so many that what all of them read stays in L2, and, where the tiles
// differ in length, more of them at the end.
constexpr int64_t kSectionBytes = 4 << 20, kUnevenLastSectionBytes = 32 << 20;

// bytes_of_group: what is read by all tiles of `group` heads.
inline TileSchedule make_backward_schedule(int heads, int group, int length, int tile_rows, int64_t bytes_of_group,
                                           bool is_even) {
  return divide_into_sections(heads, group, (length + tile_rows - 1) / tile_rows, bytes_of_group, kSectionBytes,
                              is_even ? kSectionBytes : kUnevenLastSectionBytes);
}

template <class Element, int kDimV, RowLayout kLayout>
cudaError_t launch_preprocess(const BackwardKernelParams& p, cudaStream_t stream) {
  constexpr int kLanes = kDimV <= 64 ? 8 : kDimV <= 128 ? 16 : 32;
  static_assert(kLanes * kChunkElements >= kDimV);
  const int blocks = p.call.shape.batch * p.call.shape.num_heads * (p.stat_pitch / kStatRows);
  flash_attention_backward_preprocess_kernel<Element, kLanes, kLayout><<<blocks, kPreprocessThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <class Config, class Kernel>
cudaError_t launch_tiles(Kernel kernel, const BackwardKernelParams& p, int tiles, int device, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(typename Config::SharedStorage);
  if (const cudaError_t status = allow_shared_memory<Config>(kernel, kSharedBytes, device)) return status;
  kernel<<<tiles, Config::kThreads, kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

// Of a call: whether the single pass takes it, and how many of its batches at a time. The memory for the sums of dQ is
// kept small that way; each launch has enough tiles for all SMs.
struct BackwardPlan {
  bool is_single_pass;
  int batches_at_once;
};

template <class Config>
BackwardPlan plan_backward(const BackwardParams& params, int device) {
  const AttentionShape& shape = params.shape;
  int shared_memory = 0;
  if (params.is_deterministic || find_shared_memory(device, shared_memory) != cudaSuccess ||
      shared_memory < int(sizeof(typename Config::SharedStorage)))
    return {false, shape.batch};
  constexpr int64_t kTilesOfLaunch = 1024;
  const int64_t tiles =
      int64_t((shape.key_length + Config::kTileKey - 1) / Config::kTileKey) * shape.num_kv_heads;  // of a batch
  return {true, int(std::min<int64_t>(shape.batch, (kTilesOfLaunch + tiles - 1) / tiles))};
}

template <class Config>
int64_t dq_sum_count(const AttentionShape& shape, const BackwardPlan& plan) {
  if (!plan.is_single_pass) return 0;
  const int64_t blocks = (shape.query_length + Config::kTileQuery - 1) / Config::kTileQuery;
  return plan.batches_at_once * shape.num_heads * blocks * DqAccumulator<Config>::kTileFloats;
}

template <class Config>
cudaError_t launch_single_pass(BackwardKernelParams p, const BackwardPlan& plan, int64_t bytes_of_group, bool is_even,
                               int device, cudaStream_t stream) {
  const AttentionShape& shape = p.call.shape;
  p.dq_sums = p.delta + stat_count(shape);
  p.query_blocks = (shape.query_length + Config::kTileQuery - 1) / Config::kTileQuery;
  for (p.first_batch = 0; p.first_batch < shape.batch; p.first_batch += plan.batches_at_once) {
    const int batches = std::min(plan.batches_at_once, shape.batch - p.first_batch);
    const int key_blocks = (shape.key_length + Config::kKeyBlock - 1) / Config::kKeyBlock;
    p.of_keys = make_backward_schedule(batches * shape.num_kv_heads, 1, key_blocks * Config::kKeyBlock,
                                       Config::kTileKey, bytes_of_group, is_even);
    const int query_tiles = batches * shape.num_heads * p.query_blocks;
    if (const cudaError_t status =
            cudaMemsetAsync(p.dq_sums, 0, sizeof(float) * query_tiles * DqAccumulator<Config>::kTileFloats, stream))
      return status;
    if (p.of_keys.tiles) {
      if (const cudaError_t status =
              launch_tiles<Config>(flash_attention_backward_kernel<Config>, p, p.of_keys.tiles, device, stream))
        return status;
    }
    if (!query_tiles) continue;
    flash_attention_backward_postprocess_kernel<Config><<<query_tiles, Config::kThreads, 0, stream>>>(p);
    if (const cudaError_t status = cudaGetLastError()) return status;
  }
  return cudaSuccess;
}

template <ElementType kElement, int kDimQk, int kDimV, bool kHasSoftcap, RowLayout kLayout>
cudaError_t BackwardLauncher<kElement, kDimQk, kDimV, kHasSoftcap, kLayout>::launch(const BackwardParams& params,
                                                                                    cudaStream_t stream) {
  using Element = typename ElementOf<kElement>::Type;
  using Queries = DqConfig<Element, kDimQk, kDimV, kHasSoftcap, kLayout>;
  using Keys = DkdvConfig<Element, kDimQk, kDimV, kHasSoftcap, kLayout>;
  int device = 0, sms = 0;
  if (const cudaError_t status = find_device(device, sms)) return status;
  const AttentionShape& shape = params.shape;
  const int group = shape.num_heads / shape.num_kv_heads;
  const int64_t row_bytes = 2 * (shape.dim_qk + shape.dim_v);  // of K and V, and of Q and dO
  const bool is_even = !params.segments.mode && params.window.left == AttentionWindow::kUnbounded &&
                       params.window.right == AttentionWindow::kUnbounded;
  BackwardKernelParams p = {};
  p.call = params;
  p.group_size = group;
  p.of_queries = make_backward_schedule(shape.batch * shape.num_heads, group, shape.query_length, Queries::kTileQuery,
                                        row_bytes * shape.key_length, is_even);
  p.of_keys = make_backward_schedule(shape.batch * shape.num_kv_heads, 1, shape.key_length, Keys::kTileKey,
                                     row_bytes * shape.query_length * group, is_even);
  p.lse_log2 = static_cast<float*>(params.workspace), p.delta = p.lse_log2 + stat_count(shape);
  p.stat_pitch = stat_pitch(shape);
  p.softcap = Softcap::of(params.scale, params.softcap);

  if (p.of_queries.tiles)
    if (const cudaError_t status = launch_preprocess<Element, kDimV, kLayout>(p, stream)) return status;
  if constexpr (kLayout == RowLayout::kAligned) {
    using SinglePass = SinglePassConfig<Element, kDimQk, kDimV, kHasSoftcap>;
    const BackwardPlan plan = plan_backward<SinglePass>(params, device);
    if (plan.is_single_pass)
      return launch_single_pass<SinglePass>(p, plan, row_bytes * shape.query_length * group, is_even, device, stream);
  }
  if (p.of_queries.tiles) {
    if (const cudaError_t status =
            launch_tiles<Queries>(flash_attention_backward_dq_kernel<Queries>, p, p.of_queries.tiles, device, stream))
      return status;
  }
  if (!p.of_keys.tiles) return cudaSuccess;
  return launch_tiles<Keys>(flash_attention_backward_dkdv_kernel<Keys>, p, p.of_keys.tiles, device, stream);
}

template <ElementType kElement, int kDimQk, int kDimV, bool kHasSoftcap, RowLayout kLayout>
int64_t BackwardLauncher<kElement, kDimQk, kDimV, kHasSoftcap, kLayout>::workspace_bytes(const BackwardParams& params) {
  int device = 0, sms = 0;
  if (find_device(device, sms)) return 0;  // the launch will say it
  int64_t floats = 2 * stat_count(params.shape);
  if constexpr (kLayout == RowLayout::kAligned) {
    using SinglePass = SinglePassConfig<typename ElementOf<kElement>::Type, kDimQk, kDimV, kHasSoftcap>;
    floats += dq_sum_count<SinglePass>(params.shape, plan_backward<SinglePass>(params, device));
  }
  return int64_t(sizeof(float)) * floats;
}

}  // namespace selfattn::cuda::sm80
