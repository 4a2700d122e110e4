// The main kernel of the single pass. A persistent thread block takes one tile of keys of one key head after another
// and meets the query tiles that see it, of all query heads of the group: dK and dV are summed in registers, dQ in its
// accumulator in global memory.
//
//   warp 0         producer: Q, dO, statistics of query tiles; K, V of key tiles   query_producer.cuh
//   warps 1, 2     D 256: the semaphore of dQ, deterministic mode                  dq_semaphore.cuh
//   warps 1 .. 3   else: pre- and postprocess other heads in the background        background_warps.cuh
//   warps 4 .. 11  consumers, two warpgroups                                       consumer_d128.cuh, consumer_d256.cuh
//
// One key tile up to D 128, query tiles i one after another; a column is about one block's time:
//
//   producer       K V  Q_i  dO_i        Q_i+1  dO_i+1           Q_i+2  dO_i+2   ..
//   tensor cores        S_i  dP_i  dV+=P_i dO_i  dQ_i-1  dK+=dS_i Q_i   S_i+1  dP_i+1   ..
//   arithmetic               P_i        dS_i    dQ_i-1 to its accumulator       P_i+1   ..
//
// Hand-offs. q_full, grad_out_full, k_full, v_full: TMA completes what the producer announced, consumers wait. q_empty,
// grad_out_empty, k_empty, v_empty: consumers arrive when they have read, the producer waits. grad_s_full,
// grad_s_empty: the two warpgroups lend each other their dS for dQ, which is why dQ lags one block behind.
#pragma once
#include "background_warps.cuh"
#include "consumer_d128.cuh"
#include "consumer_d256.cuh"
#include "dq_semaphore.cuh"
#include "flash/sm90/backward/query_producer.cuh"
#include "ptx/launch.cuh"
#include "ptx/register.cuh"

namespace selfattn::cuda::sm90 {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    flash_attention_backward_kernel(const __grid_constant__ BackwardMaps maps, const __grid_constant__ BackwardParams p,
                                    const __grid_constant__ BackwardSchedule schedule) {
  using namespace ptx;
  extern __shared__ __align__(1024) unsigned char s_raw[];
  auto& s = *reinterpret_cast<typename Config::SharedStorage*>(s_raw);
  launch_dependents();
  if (threadIdx.x == 0) {
    const int readers_of_info = p.is_deterministic ? DqSemaphore<Config>::kWarps : 0;
    init_ring(s.q_full, s.q_empty, Config::kConsumerWarps + readers_of_info);
    init_ring(s.grad_out_full, s.grad_out_empty, Config::kConsumerWarps);
    init_ring(s.k_full, s.k_empty, Config::kKeyEmptyArrivals);
    init_ring(s.v_full, s.v_empty, Config::kKeyEmptyArrivals);
    init_ring(s.may_add, s.added, Config::kConsumerWarps);
    for (int i = 0; i < 2; i++) {
      mbarrier_init(s.grad_s_full[i], Config::kConsumerWarps);
      mbarrier_init(s.grad_s_empty[i], Config::kConsumerWarps);
    }
    init_ring(s.background_full, s.background_empty, Config::kBackgroundWorkers);
    for (BackgroundJob& job : s.background_job) job.head = -1;
    fence_mbarrier_init();
  }
  __syncthreads();
  wait_for_previous_kernel();
  if (!has_work(p, schedule, BackwardForm::kSinglePass)) return;
  if (threadIdx.x < 128) {
    lower_registers<Config::kProducerRegisters>();
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (warp == 0) {
      QueryProducer<Config>{maps, p, schedule, s}.run();
    } else if constexpr (Config::kIsD256) {
      if (p.is_deterministic && warp <= DqSemaphore<Config>::kWarps) DqSemaphore<Config>{p, schedule, s}.run(warp == 1);
    } else {
      if (schedule.has_background_warps) {
        BackgroundWarps<Config> jobs{maps, p, schedule, s};
        if (warp == 1)
          jobs.run_loader();
        else
          jobs.run_worker(warp - 2);
      }
    }
  } else {
    raise_registers<Config::kConsumerRegisters>();
    if constexpr (Config::kIsD256)
      multiply_d256<Config>(maps, p, schedule, s);
    else
      multiply_d128<Config>(maps, p, schedule, s);
  }
}

}  // namespace selfattn::cuda::sm90
