// Exact attention forward for Hopper: out = softmax(scale * Q K^T) V.
//
// A persistent thread block takes one tile of queries after the other. Its roles:
//
//   warp 0            producer: loads Q, K and V (producer.cuh)
//   warps 1 .. W      one for each consumer: sends its rows of the output out
//   warpgroups 1 .. W consumers, W = 2 or 3: 64 query rows each (consumer.cuh)
//
// Where keys and values lie in pages, warp 3 loads V (paged_producer.cuh), and warp 2 has all consumers but the first.
//
// One tile, key blocks from n down; a column is about one block's time:
//
//   producer       K_n  Q    K_n-1  V_n    K_n-2  V_n-1    K_n-3  V_n-2   ..
//   tensor cores             S_n           S_n-1  O+=P_n V_n      S_n-2  O+=P_n-1 V_n-1   ..
//   softmax                         P_n           P_n-1           P_n-2   ..
//
// Hand-offs, each through a pair of barriers in shared memory. full: the producer announces bytes, TMA completes them,
// consumers wait. empty: every consumer warp arrives when it has read, the producer waits before it loads again.
//
//   K, V   rings of kKeyStages and kValueStages; a consumer frees K behind S, V behind P V
//   Q      kQueryStages buffers; the output leaves through the same memory: a consumer writes its rows over Q and
//          arrives at out_full, its storing warp sends them and arrives at query_empty
//
// Tiles that a NaN in V has reached, or that have huge logits, are computed once more at the end (repair.cuh).
#pragma once
#include "consumer.cuh"
#include "paged_producer.cuh"
#include "producer.cuh"
#include "ptx/register.cuh"
#include "repair.cuh"

namespace selfattn::cuda::sm90 {

constexpr int kProducerWarps = kWarpgroupSize / kWarpSize;

template <class Config>
__device__ void init_barriers(typename Config::SharedStorage& s) {
  init_ring(s.q_full, s.q_empty, Config::kWarpgroups);
  for (auto& of_stage : s.out_full)
    for (uint64_t& barrier : of_stage) ptx::mbarrier_init(barrier, kWarpgroupSize);
  init_ring(s.k_full, s.k_empty, Config::kConsumerWarps);
  init_ring(s.v_full, s.v_empty, Config::kConsumerWarps);
  if constexpr (Config::kReadsPages) init_ring(s.boxes_full, s.boxes_empty, 1);
  ptx::fence_mbarrier_init();
}

// One thread sends the output rows of one consumer warpgroup out of the buffer of Q and hands the buffer back.
template <class Config>
__device__ __forceinline__ void store_tiles(const ForwardKernelParams& p, typename Config::SharedStorage& s,
                                            int warpgroup) {
  for (Ring<Config::kQueryStages> q;; q.advance()) {
    ptx::mbarrier_wait(s.q_full[q.stage], q.parity);
    const int index = s.tile[q.stage].index, head = s.tile[q.stage].head;
    if (index < 0) return;
    ptx::mbarrier_wait(s.out_full[q.stage][warpgroup], q.parity);
    for (int panel = 0; panel < Config::kPanelsV; panel++)
      ptx::tma_store_4d(&p.out, ptx::shared_address(s.q[q.stage][warpgroup]) + panel * Config::kQueryPanelBytes,
                        panel * kPanelColumns, index * Config::kTileQuery + warpgroup * kWarpgroupRows,
                        head % p.shape.num_heads, head / p.shape.num_heads);
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
    ptx::mbarrier_arrive(s.q_empty[q.stage]);
  }
}

// The warps that move data, and those that multiply: all tiles of a pass.
template <class Config, bool kIsRepair>
__device__ __forceinline__ void move_tiles(const ForwardKernelParams& p, typename Config::SharedStorage& s, int warp) {
  if (warp == 0) {
    if constexpr (Config::kReadsPages)
      load_tiles_from_pages<Config, kIsRepair>(p, s);
    else
      load_tiles<Config, kIsRepair>(p, s);
  } else if (Config::kReadsPages && warp == kProducerWarps - 1) {
    if constexpr (Config::kReadsPages) load_values_from_pages<Config>(p, s);
  } else if (warp <= Config::kWarpgroups) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int consumers = Config::kReadsPages && warp == kProducerWarps - 2 ? Config::kWarpgroups - warp + 1 : 1;
    if (lane < consumers) store_tiles<Config>(p, s, warp - 1 + lane);
  }
  __syncwarp();
}

template <class Config>
__device__ __forceinline__ bool begin_forward_repair(const ForwardKernelParams& p, typename Config::SharedStorage& s) {
  return begin_repair<Config::kPassBarrier, Config::kThreads>(s.repair, p.repair_list, false, [&] {
    invalidate_barriers(s.q_full, s.v_empty + Config::kValueStages - 1);
    if constexpr (Config::kReadsPages) invalidate_barriers(s.boxes_full, s.boxes_empty + Config::kBoxStages - 1);
    init_barriers<Config>(s);
  });
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    flash_attention_forward_kernel(const __grid_constant__ ForwardKernelParams p) {
  extern __shared__ __align__(1024) unsigned char s_memory[];
  auto& s = *reinterpret_cast<typename Config::SharedStorage*>(s_memory);
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&p.query, &p.key, &p.value, &p.out}) ptx::prefetch_tensor_map(map);
    init_barriers<Config>(s);
    s.repair.clear();
  }
  __syncthreads();
  const int warp = __shfl_sync(~0u, threadIdx.x / kWarpSize, 0);

  if (warp < kProducerWarps) {
    ptx::lower_registers<Config::kProducerRegisters>();
    move_tiles<Config, false>(p, s, warp);
    if (begin_forward_repair<Config>(p, s)) move_tiles<Config, true>(p, s, warp);
  } else {
    ptx::raise_registers<Config::kConsumerRegisters>();
    multiply_tiles<Config, false>(p, s, warp / 4 - 1);
    if (begin_forward_repair<Config>(p, s)) {
      auto& again = *reinterpret_cast<typename Config::SharedStorage*>(s_memory + ptx::forget(0));
      multiply_tiles<Config, true>(p, again, ptx::forget(warp) / 4 - 1);
    }
  }
}

}  // namespace selfattn::cuda::sm90
