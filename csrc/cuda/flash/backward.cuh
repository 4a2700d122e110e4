// Gradients of exact attention for Hopper: dQ, dK, dV of O = softmax(scale * Q K^T) V.
//
// Two forms (docs/kernels/backward.md says when which works).
// Fused: prepare (lse in base 2, delta, cleared dQ sum), main, finish (dQ out of its float32 sum). In the main kernel a
// persistent thread block takes one tile of keys of one key head after another and streams the query tiles that see it,
// of all query heads of the group; dK and dV are summed in registers, dQ in global memory. One warp loads
// (backward_stream.cuh), two warpgroups multiply (backward_narrow.cuh, backward_wide.cuh), three warps take over most
// of the other two kernels' work (backward_side_jobs.cuh).
// Split: a kernel for dQ (backward_queries.cuh), then one for dK and dV (backward_keys.cuh), every sum in registers.
#pragma once
#include <algorithm>
#include <type_traits>

#include "../device_facts.h"
#include "../ptx/launch.cuh"
#include "../ptx/register.cuh"
#include "backward_keys.cuh"
#include "backward_launcher.h"
#include "backward_narrow.cuh"
#include "backward_queries.cuh"
#include "backward_rows.cuh"
#include "backward_side_jobs.cuh"
#include "backward_turns.cuh"
#include "backward_wide.cuh"

namespace selfattn::cuda {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    flash_attention_backward_kernel(const __grid_constant__ BackwardMaps maps, const __grid_constant__ BackwardParams p,
                                    const __grid_constant__ BackwardPlan plan) {
  using namespace ptx;
  extern __shared__ __align__(1024) unsigned char s_raw[];
  auto& s = *reinterpret_cast<typename Config::SharedStorage*>(s_raw);
  launch_dependents();
  if (threadIdx.x == 0) {
    const int readers_of_info = p.is_deterministic ? TurnKeeper<Config>::kWarps : 0;
    for (int i = 0; i < Config::kStages; i++) {
      mbarrier_init(shared_address(&s.q_full[i]), 1);
      mbarrier_init(shared_address(&s.q_free[i]), Config::kConsumerWarps + readers_of_info);
      mbarrier_init(shared_address(&s.has_turn[i]), 1),
          mbarrier_init(shared_address(&s.added[i]), Config::kConsumerWarps);
      mbarrier_init(shared_address(&s.grad_out_full[i]), 1),
          mbarrier_init(shared_address(&s.grad_out_free[i]), Config::kConsumerWarps);
    }
    for (int i = 0; i < Config::kKeyBuffers; i++) {
      mbarrier_init(shared_address(&s.k_full[i]), 1), mbarrier_init(shared_address(&s.v_full[i]), 1);
      mbarrier_init(shared_address(&s.k_free[i]), Config::kFreeKeyArrivals);
      mbarrier_init(shared_address(&s.v_free[i]), Config::kFreeKeyArrivals);
    }
    for (int i = 0; i < 2; i++) {
      mbarrier_init(shared_address(&s.grad_s_full[i]), Config::kConsumerWarps);
      mbarrier_init(shared_address(&s.grad_s_free[i]), Config::kConsumerWarps);
    }
    for (int i = 0; i < Config::kSideBuffers; i++) {
      mbarrier_init(shared_address(&s.side_full[i]), 1),
          mbarrier_init(shared_address(&s.side_free[i]), Config::kSideWorkers);
      s.side_job[i].head = -1;
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  wait_for_previous_kernel();
  if (!has_work(p, plan, BackwardForm::kFused)) return;
  if (threadIdx.x < 128) {
    lower_registers<Config::kProducerRegisters>();
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (warp == 0) {
      QueryStream<Config>{maps, p, plan, s}.run();
    } else if constexpr (Config::kIsWide) {
      if (p.is_deterministic && warp <= TurnKeeper<Config>::kWarps) TurnKeeper<Config>{p, plan, s}.run(warp == 1);
    } else {
      if (plan.has_side_jobs) {
        SideJobs<Config> jobs{maps, p, plan, s};
        if (warp == 1)
          jobs.run_loader();
        else
          jobs.run_worker(warp - 2);
      }
    }
  } else {
    raise_registers<Config::kConsumerRegisters>();
    if constexpr (Config::kIsWide)
      multiply_wide<Config>(maps, p, plan, s);
    else
      multiply_narrow<Config>(maps, p, plan, s);
  }
}

template <ElementType kElement>
struct ElementOf {
  using Type = __nv_bfloat16;
};
template <>
struct ElementOf<ElementType::kHalf> {
  using Type = __half;
};

constexpr int kRowBlocks = 8;  // thread blocks a processor of the two small kernels
constexpr int kTilesInSight = 256;
constexpr int kKeysForSideJobs = 768;  // that a query sees: else multiplying is too short to hide the side jobs

// How many keys a query sees on average, as far as the host knows: segments may be shorter.
inline int64_t keys_seen(const BackwardParams& p) {
  const int64_t length = p.shape.key_length, window = int64_t(p.window.left) + p.window.right + 1;
  const bool is_halved = window >= length && std::min(p.window.left, p.window.right) < length;
  return is_halved ? length / 2 : std::min(window, length);
}

// How many keys a query may see for the split form to be the faster one: measured (docs/kernels/backward.md).
template <class Config>
constexpr int keys_of_split() {
  return Config::kHeadDim == 128 ? 1024 : 768;
}
constexpr float kBlocksOverKeys = 1.25f;  // as seen by the segments kernel, which counts whole blocks

template <class Config>
BackwardForm choose_form(const BackwardParams& p) {
  if (Config::kIsWide) return BackwardForm::kFused;
  if (p.is_deterministic) return BackwardForm::kSplit;
  if (keys_seen(p) < keys_of_split<Config>()) return BackwardForm::kSplit;  // segments only take keys away
  return p.segments.mode ? BackwardForm::kEither : BackwardForm::kFused;
}

// How many batches the fused form takes in one launch. Where the split form may have the work, memory for the sum of dQ
// would often lie idle, so it is kept small: one launch after another, each with enough tiles for all thread blocks.
template <class Config>
int batches_of_fused(const BackwardParams& p, BackwardForm form) {
  constexpr int kTilesOfLaunch = 1024;  // about eight for each thread block
  if (form == BackwardForm::kSplit) return 0;
  if (form == BackwardForm::kFused) return p.shape.batch;
  const int64_t tiles = int64_t((p.shape.key_length + Config::kTileKv - 1) / Config::kTileKv) * p.shape.num_kv_heads;
  return int(std::min<int64_t>(p.shape.batch, (kTilesOfLaunch + tiles - 1) / tiles));
}

// The arrays of the workspace are laid out one behind the other; `end` is the first byte past them.
template <class Config>
BackwardPlan make_backward_plan(const BackwardParams& p, char** end) {
  const AttentionShape& shape = p.shape;
  BackwardPlan plan = {};
  plan.query_tiles = (shape.query_length + Config::kTileQ - 1) / Config::kTileQ;
  plan.key_tiles = (shape.key_length + Config::kTileKv - 1) / Config::kTileKv;
  plan.patch_rows = plan.query_tiles * Config::kPatchRowsOfTile;
  plan.group = shape.num_heads / shape.num_kv_heads;
  plan.pairs = shape.batch * shape.num_kv_heads;
  // Q, dO and the sum of dQ of a section stay in L2. Tiles of equal length need no more; of tiles cut by a causal limit
  // or by segments, more than there are thread blocks must be in sight, or the long ones come too late.
  const bool has_equal_tiles = p.window.right == AttentionWindow::kUnbounded && p.segments.mode == nullptr;
  constexpr int64_t kBytesOfElement = 2 + 2 + 4;
  const int64_t pair_bytes = kBytesOfElement * Config::kHeadDim * shape.query_length * plan.group;
  const int64_t by_bytes = ((has_equal_tiles ? 16 : 32) << 20) / pair_bytes;
  const int64_t by_tiles = has_equal_tiles ? 1 : (kTilesInSight + plan.key_tiles - 1) / plan.key_tiles;
  plan.pairs_of_section = int(std::clamp<int64_t>(std::max(by_bytes, by_tiles), 1, plan.pairs));
  plan.sections = (plan.pairs + plan.pairs_of_section - 1) / plan.pairs_of_section;
  plan.walks_upward = plan.group == 1;
  plan.turns_upward = !plan.walks_upward && p.window.right < AttentionWindow::kUnbounded && !p.segments.mode &&
                      !(Config::kIsWide && p.is_deterministic);
  plan.has_side_jobs = Config::kHasSideJobs && plan.sections > 1 && plan.work_tiles() >= kTilesInSight &&
                       keys_seen(p) >= kKeysForSideJobs;
  plan.form = choose_form<Config>(p);
  const int64_t pairs_of_split = int64_t(shape.batch) * shape.query_length * keys_of_split<Config>();
  plan.visits_of_split = int64_t(kBlocksOverKeys * pairs_of_split) / (kQueryBlock * Config::kTileKv);
  plan.batches_with_visits = shape.batch;
  plan.logit_of_exponent = double(p.scale) / double(p.scale * 1.4426950408889634f);
  plan.query_blocks = (shape.query_length + kQueryBlock - 1) / kQueryBlock;
  plan.stat_groups = (shape.query_length + kStatTile - 1) / kStatTile * (kStatTile / kStatRows);

  const int64_t heads = int64_t(shape.batch) * shape.num_heads;
  const int64_t heads_summed = int64_t(batches_of_fused<Config>(p, plan.form)) * shape.num_heads;
  char* at = static_cast<char*>(p.workspace);
  const auto take = [&](auto*& array, int64_t count) {
    array = reinterpret_cast<std::decay_t<decltype(array)>>(at);
    at += count * sizeof(*array);
  };
  take(plan.grad_q_sum, heads_summed * plan.patch_rows * Config::kPanels * kPatchFloats);
  take(plan.row_stats, heads * plan.stat_groups * kStatFloats);
  take(plan.turns, p.is_deterministic ? heads * plan.query_tiles : 0);
  const int64_t split_tiles = std::max<int64_t>(heads * (plan.stat_groups * kStatRows / kStatTile), plan.work_tiles());
  take(plan.repair_list, plan.form == BackwardForm::kFused ? 0 : split_tiles);
  take(plan.counters, plan.count_of_counters());
  *end = at;
  return plan;
}

template <ElementType kElement, int kHeadDim>
int64_t BackwardLauncher<kElement, kHeadDim>::workspace_bytes(const BackwardParams& p) {
  char* end;
  make_backward_plan<BackwardConfig<typename ElementOf<kElement>::Type, kHeadDim>>(p, &end);
  return end - static_cast<char*>(p.workspace);
}

// dQ, then dK and dV; `config` is set for launches in this stream.
template <class Config>
cudaError_t launch_split(const BackwardParams& p, BackwardPlan plan, const BackwardMaps& maps,
                         cudaLaunchConfig_t config, int device, int processors) {
  using Queries = QueryGradientConfig<typename Config::Element, Config::kHeadDim>;
  using Keys = KeyGradientConfig<typename Config::Element, Config::kHeadDim>;
  constexpr int kWarpgroupRows = 64;
  const auto queries_kernel = flash_attention_backward_queries_kernel<Queries>;
  const auto keys_kernel = flash_attention_backward_keys_kernel<Keys>;
  constexpr int kQueriesBytes = sizeof(typename Queries::SharedStorage),
                kKeysBytes = sizeof(typename Keys::SharedStorage);
  if (const cudaError_t status = allow_shared_memory<Queries>(queries_kernel, kQueriesBytes, device)) return status;
  if (const cudaError_t status = allow_shared_memory<Keys>(keys_kernel, kKeysBytes, device)) return status;
  const AttentionShape& shape = p.shape;
  const QueryGradientMaps query_maps = {
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
  plan.has_side_jobs = false;
  if (p.segments.mode) {
    plan.counters = p.segments.counters;  // cleared with the tables; the fused form clears its own
  } else {
    if (const cudaError_t status =
            cudaMemsetAsync(plan.counters, 0, plan.count_of_counters() * sizeof(int), config.stream))
      return status;
  }
  BackwardMaps key_maps = maps;
  key_maps.q = query_maps.q, key_maps.grad_out = query_maps.grad_out;
  const int query_tiles = (shape.query_length + Queries::kTileQ - 1) / Queries::kTileQ;
  config.blockDim = dim3(Queries::kThreads);
  config.gridDim = dim3(std::min(plan.pairs * plan.group * query_tiles, processors));
  config.dynamicSmemBytes = kQueriesBytes;
  if (const cudaError_t status = cudaLaunchKernelEx(&config, queries_kernel, query_maps, p, plan)) return status;
  config.numAttrs = 1;
  config.gridDim = dim3(std::min(plan.work_tiles(), processors)), config.dynamicSmemBytes = kKeysBytes;
  return cudaLaunchKernelEx(&config, keys_kernel, key_maps, p, plan);
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
      .side_out = query_map(p.out, shape.dim_v, Config::kSideRows),
      .side_grad_out = query_map(p.grad_out, shape.dim_v, Config::kSideRows),
  };
}

// The call for the batches first .. first + count - 1 alone. The visits of the segments stay those of all batches.
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
    segments.run_begin += int64_t(first) * segments.pitch_query;
    segments.run_end += int64_t(first) * segments.pitch_query;
    segments.query_blocks += int64_t(first) * segments.query_tiles;
    segments.key_blocks += int64_t(first) * segments.key_tiles;
    segments.order += int64_t(first) * segments.key_tiles;
  }
  return p;
}

// The three kernels; `config` is set for launches in this stream.
template <class Config>
cudaError_t launch_fused(const BackwardParams& p, const BackwardPlan& plan, cudaLaunchConfig_t config, int device,
                         int processors) {
  const auto kernel = flash_attention_backward_kernel<Config>;
  constexpr int kSharedBytes = sizeof(typename Config::SharedStorage);
  if (const cudaError_t status = allow_shared_memory<Config>(kernel, kSharedBytes, device)) return status;
  config.gridDim = dim3(std::min(plan.heads_prepared_ahead() * plan.stat_groups, kRowBlocks * processors));
  config.blockDim = dim3(kRowWarps * 32);
  if (const cudaError_t status = cudaLaunchKernelEx(&config, flash_attention_backward_prepare_kernel<Config>, p, plan))
    return status;
  config.numAttrs = 1;
  config.gridDim = dim3(std::min(plan.work_tiles(), processors)), config.blockDim = dim3(Config::kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  if (const cudaError_t status = cudaLaunchKernelEx(&config, kernel, make_backward_maps<Config>(p), p, plan))
    return status;
  const int heads_finished = plan.pairs * plan.group - plan.first_head_finished_behind();
  config.gridDim = dim3(std::min(heads_finished * plan.query_blocks, kRowBlocks * processors));
  config.blockDim = dim3(Config::kPanels * 128), config.dynamicSmemBytes = 0;
  return cudaLaunchKernelEx(&config, flash_attention_backward_finish_kernel<Config>, p, plan);
}

template <ElementType kElement, int kHeadDim>
cudaError_t BackwardLauncher<kElement, kHeadDim>::launch(const BackwardParams& p, cudaStream_t stream) {
  using Config = BackwardConfig<typename ElementOf<kElement>::Type, kHeadDim>;
  int device = 0, processors = 0;
  if (const cudaError_t status = find_device(device, processors)) return status;
  char* end;
  const BackwardPlan plan = make_backward_plan<Config>(p, &end);
  // Each kernel is brought up while the one ahead ends. That of the segments is ahead of the first.
  cudaLaunchAttribute early_start;
  early_start.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early_start.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.stream = stream, config.attrs = &early_start;
  config.numAttrs = p.segments.mode ? 1 : 0;
  if constexpr (!Config::kIsWide) {
    if (plan.form != BackwardForm::kFused) {
      const cudaError_t status =
          launch_split<Config>(p, plan, make_backward_maps<Config>(p), config, device, processors);
      if (status != cudaSuccess || plan.form == BackwardForm::kSplit) return status;
    }
  }
  const int batch = p.shape.batch, at_once = batches_of_fused<Config>(p, plan.form);
  for (int first = 0; first < batch; first += at_once) {
    const BackwardParams part = batches_of(p, first, std::min(at_once, batch - first));
    BackwardPlan plan_of_part = make_backward_plan<Config>(part, &end);
    // Which form works is decided for all batches.
    plan_of_part.visits_of_split = plan.visits_of_split, plan_of_part.batches_with_visits = batch;
    if (const cudaError_t status = launch_fused<Config>(part, plan_of_part, config, device, processors)) return status;
  }
  return cudaSuccess;
}

}  // namespace selfattn::cuda
