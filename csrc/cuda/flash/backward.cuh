// Gradients of exact attention for Hopper: dQ, dK, dV of O = softmax(scale * Q K^T) V.
//
// Three kernels: prepare (lse in base 2, delta, cleared dQ sum), main, finish (dQ out of its float32 sum). In the main
// kernel a persistent thread block takes one tile of keys of one key head after another and streams the query tiles
// that see it, of all query heads of the group; dK and dV are summed in registers, dQ in global memory. One warp loads
// (backward_stream.cuh), two warpgroups multiply (backward_narrow.cuh, backward_wide.cuh), three warps take over most
// of the other two kernels' work (backward_side_jobs.cuh).
#pragma once
#include <algorithm>
#include <type_traits>

#include "../ptx/register.cuh"
#include "backward_launcher.h"
#include "backward_narrow.cuh"
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
    mbarrier_init(shared_address(&s.k_full), 1), mbarrier_init(shared_address(&s.v_full), 1);
    mbarrier_init(shared_address(&s.k_free), Config::kFreeKeyArrivals),
        mbarrier_init(shared_address(&s.v_free), Config::kFreeKeyArrivals);
    for (int i = 0; i < Config::kSideBuffers; i++) {
      mbarrier_init(shared_address(&s.side_full[i]), 1),
          mbarrier_init(shared_address(&s.side_free[i]), Config::kSideWorkers);
      s.side_job[i].head = -1;
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    lower_registers<Config::kProducerRegisters>();
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (warp == 0) {
      QueryStream<Config>{maps, p, plan, s}.run();
    } else if (p.is_deterministic) {
      if (warp <= TurnKeeper<Config>::kWarps) TurnKeeper<Config>{p, plan, s}.run(warp == 1);
    } else if constexpr (Config::kHasSideJobs) {
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

constexpr int kTilesInSight = 256;
constexpr int kKeysForSideJobs = 768;  // that a query sees: else multiplying is too short to hide the side jobs

// How many keys a query sees on average, as far as the host knows: segments may be shorter.
inline int64_t keys_seen(const BackwardParams& p) {
  const int64_t length = p.shape.key_length, window = int64_t(p.window.left) + p.window.right + 1;
  const bool is_halved = window >= length && std::min(p.window.left, p.window.right) < length;
  return is_halved ? length / 2 : std::min(window, length);
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
  plan.has_side_jobs = Config::kHasSideJobs && !p.is_deterministic && plan.sections > 1 &&
                       plan.work_tiles() >= kTilesInSight && keys_seen(p) >= kKeysForSideJobs;

  const int64_t heads = int64_t(shape.batch) * shape.num_heads, patches = heads * plan.patch_rows * Config::kPanels;
  char* at = static_cast<char*>(p.workspace);
  const auto take = [&](auto*& array, int64_t count) {
    array = reinterpret_cast<std::decay_t<decltype(array)>>(at);
    at += count * sizeof(*array);
  };
  take(plan.grad_q_sum, patches * kPatchFloats);
  take(plan.row_stats, heads * plan.query_tiles * Config::kStatFloats);
  take(plan.turns, p.is_deterministic ? heads * plan.query_tiles : 0);
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

template <ElementType kElement, int kHeadDim>
cudaError_t BackwardLauncher<kElement, kHeadDim>::launch(const BackwardParams& p, cudaStream_t stream) {
  using Config = BackwardConfig<typename ElementOf<kElement>::Type, kHeadDim>;
  constexpr int kSharedBytes = sizeof(typename Config::SharedStorage);
  const auto kernel = flash_attention_backward_kernel<Config>;
  int device = 0, processors = 0;
  if (const cudaError_t status = cudaGetDevice(&device)) return status;
  if (const cudaError_t status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device))
    return status;
  if (const cudaError_t status =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes))
    return status;

  const AttentionShape& shape = p.shape;
  char* end;
  const BackwardPlan plan = make_backward_plan<Config>(p, &end);
  const auto query_map = [&](const TensorView& view, int dim, int rows) {
    return make_tensor_map(view, p.element, shape.batch, shape.query_length, shape.num_heads, dim, rows);
  };
  const auto key_map = [&](const TensorView& view, int dim, int rows) {
    return make_tensor_map(view, p.element, shape.batch, shape.key_length, shape.num_kv_heads, dim, rows);
  };
  const BackwardMaps maps = {
      .q = query_map(p.q, shape.dim_qk, Config::kTileQ),
      .k = key_map(p.k, shape.dim_qk, Config::kTileKv),
      .v = key_map(p.v, shape.dim_v, Config::kTileKv),
      .grad_out = query_map(p.grad_out, shape.dim_v, Config::kTileQ),
      .grad_k = key_map(p.grad_k, shape.dim_qk, Config::kStoreRows),
      .grad_v = key_map(p.grad_v, shape.dim_v, Config::kStoreRows),
      .side_out = query_map(p.out, shape.dim_v, Config::kSideRows),
      .side_grad_out = query_map(p.grad_out, shape.dim_v, Config::kSideRows),
  };
  const unsigned filled_patch_rows = (shape.query_length + kPatchRows - 1) / kPatchRows;
  const int blocks = std::min(plan.work_tiles(), processors);
  flash_attention_backward_prepare_kernel<Config>
      <<<dim3(plan.heads_prepared_ahead(), plan.patch_rows), kRowWarps * 32, 0, stream>>>(p, plan);
  flash_attention_backward_kernel<Config><<<blocks, Config::kThreads, kSharedBytes, stream>>>(maps, p, plan);
  flash_attention_backward_finish_kernel<Config>
      <<<dim3(plan.pairs * plan.group - plan.first_head_finished_behind(), filled_patch_rows), Config::kPanels * 128, 0,
         stream>>>(p, plan);
  return cudaGetLastError();
}

}  // namespace selfattn::cuda
