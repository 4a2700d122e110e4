// dK and dV of the two-pass form: a thread block owns tiles of 128 keys, a warpgroup 64 of them, and streams the query
// tiles that see them (query_producer.cuh). S^T = K Q^T, dP^T = V dO^T; P^T and dS^T are register operands of
// dV += P^T dO and dK += dS^T Q. The warpgroups share nothing but the stages, so each skips the blocks that its keys do
// not meet, and goes on to the next tile alone: K and V have two buffers.
//
// What is out of the ordinary is left to a second pass over the tiles in question (exceptional.cuh). dK and dV may be
// written over K and V, so a warpgroup stores a tile once: what it leaves to the second pass it does not store before.
#pragma once
#include "flash/sm90/backward/capped_weights.cuh"
#include "flash/sm90/backward/config.cuh"
#include "flash/sm90/backward/exceptional.cuh"
#include "flash/sm90/backward/mask.cuh"
#include "flash/sm90/backward/products.cuh"
#include "flash/sm90/backward/query_producer.cuh"
#include "ptx/arithmetic.cuh"
#include "ptx/barrier.cuh"
#include "ptx/fence.cuh"
#include "ptx/launch.cuh"
#include "ptx/matrix.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/register.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace selfattn::cuda::sm90 {

template <class Config, bool kIsRepair>
__device__ __forceinline__ void multiply_dkdv(const BackwardMaps& maps, const BackwardParams& p,
                                              const BackwardSchedule& schedule, typename Config::SharedStorage& s) {
  using namespace ptx;
  using Element = typename Config::Element;
  constexpr int kD = Config::kHeadDim, kTileQ = Config::kTileQ, kTileKv = Config::kTileKv;
  constexpr int kQPanel = kTileQ * 128, kKvPanel = kTileKv * 128;  // bytes
  const auto [warpgroup, warp, lane] = WarpPlace(int(kIsRepair ? forget(threadIdx.x) : threadIdx.x));
  const float scale_log2 = p.scale * kLog2E;
  const int own_row = warpgroup * 64 + warp * 16;

  float dk[kD / 2], dv[kD / 2], scores[kTileQ / 2], dp[kTileQ / 2];
  uint32_t p_packed[kTileQ / 4], ds_packed[kTileQ / 4];
  HeldRows<kIsRepair ? 0 : Config::kHeldSteps> v_held;  // the repair wants its registers
  Ring<Config::kStages> ring;
  Ring<Config::kKeyBuffers> key_ring;

  const uint32_t s_q = shared_address(s.q), s_do = shared_address(s.grad_out);
  const uint64_t k_rows = matrix_descriptor(shared_address(s.k) + warpgroup * 64 * 128),
                 v_rows = matrix_descriptor(shared_address(s.v) + warpgroup * 64 * 128);
  // Q and dO with queries as rows, and with queries as the summed dimension.
  const uint64_t q_rows = matrix_descriptor(s_q), do_rows = matrix_descriptor(s_do);
  const uint64_t q_summed = matrix_descriptor(s_q, kQPanel), do_summed = matrix_descriptor(s_do, kQPanel);

  const auto issue_scores = [&] {
    multiply_rows<Element, kD, kKvPanel, kQPanel>(scores, k_rows + key_ring.stage * operand_step(Config::kKeyBytes),
                                                  q_rows + ring.stage * operand_step(Config::kQueryBytes));
  };
  const auto issue_dp = [&] {
    multiply_rows<Element, kD, kKvPanel, kQPanel>(dp, v_rows + key_ring.stage * operand_step(Config::kKeyBytes),
                                                  do_rows + ring.stage * operand_step(Config::kQueryBytes), v_held);
  };
  const auto arrive = [&](uint64_t& barrier) { arrive_by_warp(barrier, lane); };
  // Writes this warp's 16 keys of dK or dV over its rows of V or K and, if they are final, on to global memory.
  const auto store = [&](const CUtensorMap* map, float (&d)[kD / 2], float factor, unsigned char* s_panels,
                         const TileInfo& tile, bool is_final) {
    const uint32_t s_rows = shared_address(s_panels) + own_row * 128, s_row = s_rows + lane % 16 * 128;
    store_rows<Element, kKvPanel>(s_row, lane, d, factor);
    fence_proxy_async_shared();
    __syncwarp();
    if (lane == 0 && is_final) {
#pragma unroll
      for (int panel = 0; panel < Config::kPanels; panel++) {
        tma_store_4d(map, s_rows + panel * kKvPanel, panel * kPanelColumns, tile.key_tile * kTileKv + own_row,
                     tile.head, tile.batch);
      }
      bulk_commit();
    }
  };
  const int skip_flag = kSkipWarpgroup0 << warpgroup, mask_flag = kMaskWarpgroup0 << warpgroup;

  for (bool is_first = true;; is_first = false) {
    mbarrier_wait(s.k_full[key_ring.stage], key_ring.parity);  // the tile and its K are there
    const TileInfo tile = s.tile[key_ring.stage];
    if (tile.key_tile < 0) break;
#pragma unroll
    for (int i = 0; i < kD / 2; i++) dk[i] = dv[i] = 0.f;
    pin(dk), pin(dv);
    mbarrier_wait(s.v_full[key_ring.stage], key_ring.parity);
    v_held.template load<kKvPanel>(shared_address(s.v[key_ring.stage]) + (own_row + lane % 16) * 128, lane);
    const int first_key = tile.key_tile * kTileKv + own_row + lane / 4;
    RowIntervals rows;
    bool is_open = false;
    // Once a tile, behind the issue of its first product.
    const auto free_buffers_before = [&] {
      is_open = true;
      if (is_first) return;
      if (lane == 0) bulk_wait_read<0>();  // dK and dV of the tile before have left
      __syncwarp();
      const int before = key_ring.next().stage;
      arrive(s.k_empty[before]), arrive(s.v_empty[before]);
    };

    for (bool is_last = false; !is_last;) {  // runs of blocks that this warpgroup's keys meet, and what lies between
      mbarrier_wait(s.q_full[ring.stage], ring.parity);
      BlockInfo block = s.block[ring.stage];
      if (block.flags & skip_flag) {  // the other warpgroup's alone: handed back unread
        is_last = block.flags & kLastOfTile;
        mbarrier_wait(s.grad_out_full[ring.stage], ring.parity);
        arrive(s.q_empty[ring.stage]), arrive(s.grad_out_empty[ring.stage]);
        ring.advance();
        continue;
      }
      issue_scores();
      mbarrier_wait(s.grad_out_full[ring.stage], ring.parity);
      issue_dp();
      if (!is_open) {
        rows = query_intervals(p, block.flags, tile.batch, first_key);
        free_buffers_before();
      }
      int stage;
#pragma unroll 1
      for (;;) {  // on entry S and dP are in flight
        const float* stats = &s.row_stats[ring.stage][2 * (lane % 4)];
        const bool is_masked = block.flags & mask_flag;
        const int column = 2 * (lane % 4), first_query = block.query_tile * kTileQ + column;

        wgmma_wait<1>();  // S is done
        pin(scores);
        if constexpr (Config::kHasSoftcap) {
          schedule.softcap.apply(scores);
          if constexpr (kIsRepair)
            weigh_capped_exactly<Element, kTileQ>(scores, p_packed, p, schedule.softcap, stats, block.head,
                                                  first_query);
          else
            weigh_capped<Element, kTileQ>(scores, p_packed, schedule.softcap, stats);
          if (is_masked) {
            if constexpr (kIsRepair)
              clear_queries<kTileQ, Config::kPanels, kQPanel>(s.q[ring.stage], s.grad_out[ring.stage],
                                                              s.row_stats[ring.stage]);
            mask_scores<kTileQ>(scores, p, rows, block.flags, tile.batch, first_key, first_query,
                                &s.query_ids[ring.stage][column]);
            clear_masked(scores, p_packed);
          }
        } else {
          take_exponents<kTileQ>(scores, stats, scale_log2);
          if constexpr (kIsRepair) {
            refine_exponents<kTileQ>(scores, p, schedule, stats, block.head, first_query);
            if (is_masked)
              clear_queries<kTileQ, Config::kPanels, kQPanel>(s.q[ring.stage], s.grad_out[ring.stage],
                                                              s.row_stats[ring.stage]);
          }
          if (is_masked)
            mask_scores<kTileQ>(scores, p, rows, block.flags, tile.batch, first_key, first_query,
                                &s.query_ids[ring.stage][column]);
#pragma unroll
          for (int i = 0; i < kTileQ / 2; i += 2) {
            scores[i] = exp2_approx(scores[i]), scores[i + 1] = exp2_approx(scores[i + 1]);
            p_packed[i / 2] = pack<Element>(scores[i], scores[i + 1]);
          }
        }
        accumulate<Element, kTileQ>(dv, p_packed, do_summed + ring.stage * operand_step(Config::kQueryBytes));

        wgmma_wait<1>();  // dP is done, dV runs
        pin(dp);
        pack_score_gradients<Element, kTileQ, kIsRepair>(scores, dp, stats, ds_packed);
        accumulate<Element, kTileQ>(dk, ds_packed, q_summed + ring.stage * operand_step(Config::kQueryBytes));

        stage = ring.stage;
        is_last = block.flags & kLastOfTile;
        ring.advance();
        if (is_last) break;
        mbarrier_wait(s.q_full[ring.stage], ring.parity);  // the next block
        block = s.block[ring.stage];
        if (block.flags & skip_flag) break;
        wgmma_wait<0>();  // the packed P and dS give their registers back
        pin(dk), pin(dv);
        arrive(s.q_empty[stage]), arrive(s.grad_out_empty[stage]);  // the producer may load over this block
        issue_scores();
        mbarrier_wait(s.grad_out_full[ring.stage], ring.parity);
        issue_dp();
      }
      wgmma_wait<0>();
      pin(dk), pin(dv);
      arrive(s.q_empty[stage]), arrive(s.grad_out_empty[stage]);
    }
    if (!is_open) free_buffers_before();
    // This warpgroup has read its rows of K and V. A dS that is not finite has made all of the key's row of dK so.
    const bool is_spoilt =
        barrier_any(kWarpgroup0Barrier + warpgroup, 128, !kIsRepair && is_any_non_finite(dk[0], dk[2]));
    if (!kIsRepair) s.repair.mark_if(is_spoilt, key_ring.stage, warpgroup);
    const bool is_final = kIsRepair ? tile.warpgroups >> warpgroup & 1 : !is_spoilt;
    store(&maps.grad_v, dv, 1.f, s.v[key_ring.stage], tile, is_final);
    store(&maps.grad_k, dk, p.scale, s.k[key_ring.stage], tile, is_final);
    key_ring.advance();
  }
  if (lane == 0) bulk_wait<0>();
}

template <class Config>
__device__ void init_dkdv_barriers(typename Config::SharedStorage& s) {
  init_ring(s.q_full, s.q_empty, Config::kConsumerWarps);
  init_ring(s.grad_out_full, s.grad_out_empty, Config::kConsumerWarps);
  init_ring(s.k_full, s.k_empty, Config::kConsumerWarps);
  init_ring(s.v_full, s.v_empty, Config::kConsumerWarps);
  ptx::fence_mbarrier_init();
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    flash_attention_backward_dkdv_kernel(const __grid_constant__ BackwardMaps maps,
                                         const __grid_constant__ BackwardParams p,
                                         const __grid_constant__ BackwardSchedule schedule) {
  using namespace ptx;
  extern __shared__ __align__(1024) unsigned char s_raw[];
  auto& s = *reinterpret_cast<typename Config::SharedStorage*>(s_raw);
  if (threadIdx.x == 0) {
    init_dkdv_barriers<Config>(s);
    s.repair.clear();
  }
  __syncthreads();
  launch_dependents();
  wait_for_previous_kernel();
  if (!has_work(p, schedule, BackwardForm::kTwoPass)) return;
  const bool repairs_all = *schedule.has_exact_stats();
  const auto begin_second_pass = [&] {
    return begin_repair<kPassBarrier, Config::kConsumers + 32>(s.repair, schedule.repair_list, repairs_all, [&] {
      invalidate_barriers(s.q_full, s.v_empty + Config::kKeyBuffers - 1);
      init_dkdv_barriers<Config>(s);
    });
  };
  if (threadIdx.x < 128) {
    lower_registers<Config::kProducerRegisters>();
    if (threadIdx.x >= 32) return;
    if (!repairs_all) QueryProducer<Config>{maps, p, schedule, s}.run();
    if (begin_second_pass()) QueryProducer<Config, true>{maps, p, schedule, s, repairs_all}.run();
  } else {
    raise_registers<Config::kConsumerRegisters>();
    if (!repairs_all) multiply_dkdv<Config, false>(maps, p, schedule, s);
    if (begin_second_pass()) multiply_dkdv<Config, true>(maps, p, schedule, *forget(&s));
  }
}

}  // namespace selfattn::cuda::sm90
