// Gradients of exact attention for Hopper: dQ, dK, dV of O = softmax(scale * Q K^T) V. Host side of one head dimension
// and element type: params -> schedule, tensor maps, launches.
//
// Two forms (docs/kernels/backward.md says when which works).
//   single pass  preprocess (lse in base 2, delta, cleared dQ accumulator), main kernel, postprocess (dQ out of its
//                accumulator)
//   two passes   a kernel for dQ, then one for dK and dV, every sum in registers
#pragma once
#include <algorithm>

#include "flash/tile/element.h"
#include "host/device.h"
#include "launcher.h"
#include "make_schedule.cuh"
#include "single_pass/kernel.cuh"
#include "single_pass/postprocess.cuh"
#include "single_pass/preprocess.cuh"
#include "two_pass/dkdv_kernel.cuh"
#include "two_pass/dq_kernel.cuh"

namespace selfattn::cuda::sm90 {

template <ElementType kElement, int kHeadDim, bool kHasSoftcap>
int64_t BackwardLauncher<kElement, kHeadDim, kHasSoftcap>::workspace_bytes(const BackwardParams& p) {
  char* end;
  make_backward_schedule<BackwardConfig<typename ElementOf<kElement>::Type, kHeadDim>>(p, &end);
  return end - static_cast<char*>(p.workspace);
}

// dQ, then dK and dV; `config` is set for launches in this stream.
template <class Config>
cudaError_t launch_two_pass(const BackwardParams& p, BackwardSchedule schedule, const BackwardMaps& maps,
                            cudaLaunchConfig_t config, int device, int sms) {
  using Queries = DqConfig<typename Config::Element, Config::kHeadDim, Config::kHasSoftcap>;
  using Keys = DkdvConfig<typename Config::Element, Config::kHeadDim, Config::kHasSoftcap>;
  constexpr int kWarpgroupRows = 64;
  const auto queries_kernel = flash_attention_backward_dq_kernel<Queries>;
  const auto keys_kernel = flash_attention_backward_dkdv_kernel<Keys>;
  constexpr int kQueriesBytes = sizeof(typename Queries::SharedStorage),
                kKeysBytes = sizeof(typename Keys::SharedStorage);
  if (const cudaError_t status = allow_shared_memory<Queries>(queries_kernel, kQueriesBytes, device)) return status;
  if (const cudaError_t status = allow_shared_memory<Keys>(keys_kernel, kKeysBytes, device)) return status;
  const AttentionShape& shape = p.shape;
  const DqMaps query_maps = {
      .q = make_tensor_map(p.q, p.element, shape.batch, shape.query_length, shape.num_heads, shape.dim_qk,
                           kWarpgroupRows),
      .out = make_tensor_map(p.out, p.element, shape.batch, shape.query_length, shape.num_heads, shape.dim_v,
                             kWarpgroupRows),
      .grad_out = make_tensor_map(p.grad_out, p.element, shape.batch, shape.query_length, shape.num_heads, shape.dim_v,
                                  kWarpgroupRows),
      .k = make_tensor_map(p.k, p.element, shape.batch, shape.key_length, shape.num_kv_heads, shape.dim_qk,
                           Queries::kTileKv),
      .v = make_tensor_map(p.v, p.element, shape.batch, shape.key_length, shape.num_kv_heads, shape.dim_v,
                           Queries::kTileKv),
      .grad_q = make_tensor_map(p.grad_q, p.element, shape.batch, shape.query_length, shape.num_heads, shape.dim_qk,
                                Queries::kStoreRows),
  };
  schedule.has_background_warps = false;
  if (p.segments.mode) {
    schedule.counters = p.segments.counters;  // cleared with the tables; the single-pass form clears its own
  } else {
    if (const cudaError_t status =
            cudaMemsetAsync(schedule.counters, 0, schedule.count_of_counters() * sizeof(int), config.stream))
      return status;
  }
  BackwardMaps key_maps = maps;
  key_maps.q = query_maps.q, key_maps.grad_out = query_maps.grad_out;
  const int query_tiles = (shape.query_length + Queries::kTileQ - 1) / Queries::kTileQ;
  config.blockDim = dim3(Queries::kThreads);
  config.gridDim = dim3(std::min(schedule.kv_groups * schedule.group_size * query_tiles, sms));
  config.dynamicSmemBytes = kQueriesBytes;
  if (const cudaError_t status = cudaLaunchKernelEx(&config, queries_kernel, query_maps, p, schedule)) return status;
  config.numAttrs = 1;
  config.gridDim = dim3(std::min(schedule.work_tiles(), sms)), config.dynamicSmemBytes = kKeysBytes;
  return cudaLaunchKernelEx(&config, keys_kernel, key_maps, p, schedule);
}

template <class Config>
BackwardMaps make_backward_maps(const BackwardParams& p) {
  const AttentionShape& shape = p.shape;
  const auto query_map = [&](const TensorView& view, int dim, int rows) {
    return make_tensor_map(view, p.element, shape.batch, shape.query_length, shape.num_heads, dim, rows);
  };
  const auto key_map = [&](const TensorView& view, int dim, int rows) {
    return make_tensor_map(view, p.element, shape.batch, shape.key_length, shape.num_kv_heads, dim, rows);
  };
  return {
      .q = query_map(p.q, shape.dim_qk, Config::kTileQ),
      .k = key_map(p.k, shape.dim_qk, Config::kTileKv),
      .v = key_map(p.v, shape.dim_v, Config::kTileKv),
      .grad_out = query_map(p.grad_out, shape.dim_v, Config::kTileQ),
      .grad_k = key_map(p.grad_k, shape.dim_qk, Config::kStoreRows),
      .grad_v = key_map(p.grad_v, shape.dim_v, Config::kStoreRows),
      .background_out = query_map(p.out, shape.dim_v, Config::kBackgroundRows),
      .background_grad_out = query_map(p.grad_out, shape.dim_v, Config::kBackgroundRows),
  };
}

// The call for the batches first .. first + count - 1 alone. The computed_blocks of the segments stay those of all
// batches.
inline BackwardParams batches_of(BackwardParams p, int first, int count) {
  p.shape.batch = count;
  for (TensorView* view : {&p.q, &p.k, &p.v, &p.out, &p.grad_out, &p.grad_q, &p.grad_k, &p.grad_v}) {
    constexpr int kElementBytes = 2;
    view->data = static_cast<char*>(view->data) + kElementBytes * first * view->stride_batch;
  }
  const int64_t rows = int64_t(first) * p.shape.num_heads * p.shape.query_length;
  p.lse += rows;
  if (p.grad_lse) p.grad_lse += rows;
  SegmentTables& segments = p.segments;
  if (segments.mode) {
    segments.mode += first;
    segments.query_ids += int64_t(first) * segments.pitch_query;
    segments.key_ids += int64_t(first) * segments.pitch_key;
    segments.key_begin += int64_t(first) * segments.pitch_query;
    segments.key_end += int64_t(first) * segments.pitch_query;
    segments.query_begin += int64_t(first) * segments.pitch_key;
    segments.query_end += int64_t(first) * segments.pitch_key;
    segments.query_blocks += int64_t(first) * segments.query_tiles;
    segments.key_blocks += int64_t(first) * segments.key_tiles;
    segments.order += int64_t(first) * segments.key_tiles;
  }
  return p;
}

constexpr int kRowBlocks = 8;  // thread blocks an SM of the two small kernels

// The three kernels; `config` is set for launches in this stream.
template <class Config>
cudaError_t launch_single_pass(const BackwardParams& p, const BackwardSchedule& schedule, cudaLaunchConfig_t config,
                               int device, int sms) {
  const auto kernel = flash_attention_backward_kernel<Config>;
  constexpr int kSharedBytes = sizeof(typename Config::SharedStorage);
  if (const cudaError_t status = allow_shared_memory<Config>(kernel, kSharedBytes, device)) return status;
  config.gridDim = dim3(std::min(schedule.heads_preprocessed_ahead() * schedule.stat_groups, kRowBlocks * sms));
  config.blockDim = dim3(kRowWarps * 32);
  if (const cudaError_t status =
          cudaLaunchKernelEx(&config, flash_attention_backward_preprocess_kernel<Config>, p, schedule))
    return status;
  config.numAttrs = 1;
  config.gridDim = dim3(std::min(schedule.work_tiles(), sms)), config.blockDim = dim3(Config::kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  if (const cudaError_t status = cudaLaunchKernelEx(&config, kernel, make_backward_maps<Config>(p), p, schedule))
    return status;
  const int heads_postprocessed = schedule.kv_groups * schedule.group_size - schedule.first_head_postprocessed_behind();
  config.gridDim = dim3(std::min(heads_postprocessed * schedule.query_blocks, kRowBlocks * sms));
  config.blockDim = dim3(Config::kPanels * 128), config.dynamicSmemBytes = 0;
  return cudaLaunchKernelEx(&config, flash_attention_backward_postprocess_kernel<Config>, p, schedule);
}

template <ElementType kElement, int kHeadDim, bool kHasSoftcap>
cudaError_t BackwardLauncher<kElement, kHeadDim, kHasSoftcap>::launch(const BackwardParams& p, cudaStream_t stream) {
  using Config = BackwardConfig<typename ElementOf<kElement>::Type, kHeadDim, kHasSoftcap>;
  int device = 0, sms = 0;
  if (const cudaError_t status = find_device(device, sms)) return status;
  sms = sms_to_take(sms, p.sms_left_free);
  char* end;
  const BackwardSchedule schedule = make_backward_schedule<Config>(p, &end);
  // Each kernel is brought up while the one ahead ends. That of the segments is ahead of the first.
  cudaLaunchAttribute early_start = dependent_launch();
  cudaLaunchConfig_t config{};
  config.stream = stream, config.attrs = &early_start;
  config.numAttrs = p.segments.mode ? 1 : 0;
  if constexpr (!Config::kIsD256) {
    if (schedule.form != BackwardForm::kSinglePass) {
      const cudaError_t status =
          launch_two_pass<Config>(p, schedule, make_backward_maps<Config>(p), config, device, sms);
      if (status != cudaSuccess || schedule.form == BackwardForm::kTwoPass) return status;
    }
  }
  const int batch = p.shape.batch, at_once = batches_of_single_pass<Config>(p, schedule.form);
  for (int first = 0; first < batch; first += at_once) {
    const BackwardParams part = batches_of(p, first, std::min(at_once, batch - first));
    BackwardSchedule schedule_of_part = make_backward_schedule<Config>(part, &end);
    // Which form works is decided for all batches.
    schedule_of_part.max_blocks_of_two_pass = schedule.max_blocks_of_two_pass, schedule_of_part.batches_counted = batch;
    if (const cudaError_t status = launch_single_pass<Config>(part, schedule_of_part, config, device, sms))
      return status;
  }
  return cudaSuccess;
}

}  // namespace selfattn::cuda::sm90
