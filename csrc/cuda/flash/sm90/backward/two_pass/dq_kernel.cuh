// dQ of the two-pass form: a thread block owns tiles of 128 queries, a warpgroup 64 of them, with Q in registers, and
// streams the 64-key tiles that they see. S = Q K^T, dP = dO V^T; dS is the register operand of dQ += dS K. The next
// S and dP are multiplied before this dQ, so that the tensor cores have them while exponentials run.
//
// It also computes what both kernels want to know of the rows (kStatFloats): O comes in as a block of its own, ahead of
// the keys.
//
// What is out of the ordinary is left to a second pass over the tiles in question (exceptional.cuh). dQ may be written
// over O, so the second pass takes the statistics of the rows from the first.
#pragma once
#include "dq_producer.cuh"
#include "flash/sm90/backward/capped_weights.cuh"
#include "flash/sm90/backward/config.cuh"
#include "flash/sm90/backward/exceptional.cuh"
#include "flash/sm90/backward/intervals.cuh"
#include "flash/sm90/backward/mask.cuh"
#include "flash/sm90/backward/products.cuh"
#include "flash/sm90/backward/row_stats.cuh"
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
__device__ __forceinline__ void multiply_dq(const DqMaps& maps, const BackwardParams& p,
                                            const BackwardSchedule& schedule, typename Config::SharedStorage& s) {
  using namespace ptx;
  using Element = typename Config::Element;
  constexpr int kD = Config::kHeadDim, kTileQ = Config::kTileQ, kTileKv = Config::kTileKv;
  constexpr int kPanel = 64 * 128;  // bytes, of every operand
  const auto [warpgroup, warp, lane] = WarpPlace(int(kIsRepair ? forget(threadIdx.x) : threadIdx.x));
  const float scale_log2 = p.scale * kLog2E;
  const int row_in_tile = warpgroup * 64 + warp * 16 + lane / 4;  // this lane's rows: this one and the eighth after it

  float dq[kD / 2], scores[kTileKv / 2], dp[kTileKv / 2];
  uint32_t q[kD / 4], ds_packed[kTileKv / 4];
  Ring<Config::kStages> ring;
  uint32_t tile_parity = 0;
  int grad_out_buffer = 0;

  const uint64_t do_rows = matrix_descriptor(shared_address(s.grad_out) + warpgroup * (Config::kPanels * kPanel));
  // Keys as rows, and (for dQ) as the summed dimension.
  const uint64_t k_rows = matrix_descriptor(shared_address(s.k)), v_rows = matrix_descriptor(shared_address(s.v));
  const uint64_t k_summed = matrix_descriptor(shared_address(s.k), kPanel);
  // The row of 16 columns that matrix instructions take from this lane, in this warpgroup's panels.
  const uint32_t lane_row_of_warpgroup = (warp * 16 + lane % 16) * 128;
  const uint32_t lane_row = warpgroup * (Config::kPanels * kPanel) + lane_row_of_warpgroup;
  const auto chunk = [&](int i) { return swizzled_columns(i, lane, kPanel); };

  const auto issue_scores = [&] {
    const uint64_t right = k_rows + ring.stage * operand_step(Config::kKeyBytes);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kD / kProductStep; i++) {
      const uint64_t b = right + operand_columns(i, kPanel);
      if (i == 0)
        Wgmma<Element, kTileKv>::template rs_overwrite<>(scores, q, b);
      else
        Wgmma<Element, kTileKv>::template rs<>(scores, q + 4 * i, b);
    }
    wgmma_commit();
  };
  const auto issue_dp = [&] {
    multiply_rows<Element, kD, kPanel, kPanel>(dp, do_rows + grad_out_buffer * operand_step(Config::kQueryBytes),
                                               v_rows + ring.stage * operand_step(Config::kKeyBytes));
  };
  const auto issue_dq = [&](int stage) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kTileKv / kProductStep; i++)
      Wgmma<Element, kD>::template rs<true>(
          dq, ds_packed + 4 * i, k_summed + operand_step(stage * Config::kKeyBytes + i * kProductStep * 128));
    wgmma_commit();
  };
  const auto arrive = [&](uint64_t& barrier) { arrive_by_warp(barrier, lane); };
  const auto arrive_both = [&] {
    arrive(s.k_empty[ring.stage]), arrive(s.v_empty[ring.stage]);
    ring.advance();
  };
  // The statistics of this lane's rows where some may be out of the ordinary. Rows that are not finite, and those whose
  // Q is not though they see no key, get NaN for their delta, which then reaches every dS of theirs: the first pass of
  // the kernel for dK and dV sees it.
  const auto look_closer = [&](int head, int first_query, float (&lse)[2], float (&delta)[2], uint32_t (&out_bits)[2]) {
    FiniteTest<Element> q_test[2];
#pragma unroll
    for (int i = 0; i < kD / 4; i++) q_test[i % 2].add(q[i]);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const unsigned row_lanes = 0xfu << lane / 4 * 4;
      const bool is_q_finite = !(__ballot_sync(~0u, !q_test[r].all_finite()) & row_lanes);
      const bool is_out_zero = !(__ballot_sync(~0u, out_bits[r] != 0) & row_lanes);
      const float2 stats =
          row_stats(p, head, first_query + 8 * r, lse[r], delta[r], [&] { return is_out_zero && !is_q_finite; });
      lse[r] = stats.x, delta[r] = is_q_finite && stats.x == stats.x ? stats.y : NAN;
    }
    if (is_exact_stat(lse[0]) || is_exact_stat(lse[1])) *schedule.has_exact_stats() = 1;
  };
  // tanh to slope weights (capped_weights.cuh).
  const auto weigh_capped_rows = [&](const typename Config::Tile& tile, int head, const float (&lse)[2]) {
    const Softcap& softcap = schedule.softcap;
    const float* g_lse = p.lse + int64_t(head) * p.shape.query_length + tile.query_tile * kTileQ + row_in_tile;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const bool is_exact = kIsRepair && is_exact_stat(lse[r]);
      const float natural_lse = is_exact ? g_lse[8 * r] : 0.f;
#pragma unroll
      for (int i = 0; i < kTileKv / 4; i++) {
        float& t = scores[i / 2 * 4 + 2 * r + i % 2];
        take_weight(
            t, is_exact ? exact_exponent_of_capped(t, softcap.cap, natural_lse) : fmaf(t, softcap.cap_log2, -lse[r]));
      }
    }
  };
  const int skip_flag = kSkipWarpgroup0 << warpgroup, mask_flag = kMaskWarpgroup0 << warpgroup;

  for (bool is_first = true;; is_first = false, tile_parity ^= 1, grad_out_buffer ^= 1) {
    mbarrier_wait(s.q_full, tile_parity);  // the tile, its Q and its dO are there
    const typename Config::Tile tile = s.tile;
    if (tile.query_tile < 0) break;
#pragma unroll
    for (int i = 0; i < kD / 16; i++) load_matrix_x4(shared_address(s.q) + lane_row + chunk(i), q + 4 * i);
    const int head = tile.batch * p.shape.num_heads + tile.head;
    float lse[2], delta[2] = {};
    uint32_t out_bits[2] = {};
    RowIntervals rows;
    int row_id[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = row_in_tile + 8 * r, query = tile.query_tile * kTileQ + row;
      lse[r] = query < p.shape.query_length ? p.lse[int64_t(head) * p.shape.query_length + query] : -INFINITY;
      Interval keys = visible_keys_by_window(p, query);
      if (tile.mode == kContiguous) keys = {max(keys.begin, s.rows[0][row]), min(keys.end, s.rows[1][row])};
      rows.set(r, keys);
      row_id[r] = s.rows[0][row];
    }
    if (!is_first && lane == 0) bulk_wait_read<0>();  // dQ of the tile before has left its buffer
    __syncwarp();
    arrive(s.q_empty);  // Q is in registers
    if (!is_first) arrive(s.grad_out_empty[grad_out_buffer ^ 1]);

    // O comes as the first block. delta of this lane's rows, and whether they are out of the ordinary.
    mbarrier_wait((warpgroup ? s.v_full : s.k_full)[ring.stage], ring.parity);
    const uint32_t s_out = shared_address((warpgroup ? s.v : s.k)[ring.stage]) + lane_row_of_warpgroup,
                   s_grad_out = shared_address(s.grad_out[grad_out_buffer]) + lane_row;
#pragma unroll
    for (int i = 0; i < kD / 16; i++) {
      uint32_t out[4], grad_out[4];
      load_matrix_x4(s_out + chunk(i), out);
      load_matrix_x4(s_grad_out + chunk(i), grad_out);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        out_bits[j % 2] |= out[j] & 0x7fff7fffu;
        const float2 x = unpack<Element>(out[j]), y = unpack<Element>(grad_out[j]);
        delta[j % 2] = fmaf(x.x, y.x, fmaf(x.y, y.y, delta[j % 2]));
      }
    }
    arrive_both();
    const int first_query = tile.query_tile * kTileQ + row_in_tile;
    if constexpr (kIsRepair) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float2 stats = load_row_stats(schedule, head, first_query + 8 * r);
        lse[r] = stats.x, delta[r] = stats.y;
      }
    } else {
      bool is_ordinary = true;
#pragma unroll
      for (int r = 0; r < 2; r++) {
        delta[r] += __shfl_xor_sync(~0u, delta[r], 1);
        delta[r] += __shfl_xor_sync(~0u, delta[r], 2);
        is_ordinary &= is_ordinary_row(lse[r], delta[r], out_bits[r] == 0);  // the bits of this lane alone: may err
      }
      if (__any_sync(~0u, !is_ordinary || p.grad_lse)) [[unlikely]]
        look_closer(head, first_query, lse, delta, out_bits);
      else
        lse[0] *= kLog2E, lse[1] *= kLog2E;
#pragma unroll
      for (int r = 0; r < 2; r++)
        if (lane % 4 == 0) store_row_stats(schedule, head, first_query + 8 * r, {lse[r], delta[r]});
    }
#pragma unroll
    for (int i = 0; i < kD / 2; i++) dq[i] = 0.f;
    pin(dq);

    for (bool is_last = false; !is_last;) {  // runs of blocks that this warpgroup's queries meet, and what lies between
      mbarrier_wait(s.k_full[ring.stage], ring.parity);
      typename Config::KeyTileInfo block = s.block[ring.stage];
      if (block.flags & skip_flag) {  // the other warpgroup's alone: handed back unread
        is_last = block.flags & kLastOfTile;
        mbarrier_wait(s.v_full[ring.stage], ring.parity);
        arrive_both();
        continue;
      }
      issue_scores();
      mbarrier_wait(s.v_full[ring.stage], ring.parity);
      issue_dp();
      wgmma_commit();  // in the place of dQ
      int read_stage = -1, stage;
#pragma unroll 1
      for (;;) {          // on entry S, dP and dQ of the block before are in flight
        wgmma_wait<2>();  // S is done
        pin(scores);
#pragma unroll
        for (int i = 0; i < kTileKv / 2 && !Config::kHasSoftcap; i++)
          scores[i] = fmaf(scores[i], scale_log2, -lse[i / 2 % 2]);
        if constexpr (Config::kHasSoftcap) {
          schedule.softcap.apply(scores);
          weigh_capped_rows(tile, head, lse);
        } else if constexpr (kIsRepair) {
          const float* g_lse = p.lse + int64_t(head) * p.shape.query_length + tile.query_tile * kTileQ + row_in_tile;
#pragma unroll
          for (int r = 0; r < 2; r++) {
            if (!is_exact_stat(lse[r])) continue;
            const float natural_lse = g_lse[8 * r];
#pragma unroll
            for (int i = 0; i < kTileKv / 4; i++) {
              float& exponent = scores[i / 2 * 4 + 2 * r + i % 2];
              exponent = exact_exponent(schedule, exponent, lse[r], natural_lse);
            }
          }
        }
        if (block.flags & mask_flag) {
          const int column = 2 * (lane % 4);
          const int first_key = block.key_tile * kTileKv + column;
          mask_by_intervals<kTileKv>(scores, rows, first_key);
          if (block.flags & kMaskedByIds)
            mask_by_ids(scores, row_id, p.segments.key_ids + int64_t(tile.batch) * p.segments.pitch_key + first_key);
          if constexpr (Config::kHasSoftcap) clear_masked(scores);
        }
#pragma unroll
        for (int i = 0; i < kTileKv / 2 && !Config::kHasSoftcap; i++) scores[i] = exp2_approx(scores[i]);

        wgmma_wait<1>();  // dP is done
        pin(dp);
        arrive(s.v_empty[ring.stage]);  // the producer may load over V
#pragma unroll
        for (int i = 0; i < kTileKv / 2; i++)  // dS = P (dP - delta)
          scores[i] = kIsRepair && scores[i] == 0.f ? 0.f : scores[i] * (dp[i] - delta[i / 2 % 2]);
        if (kIsRepair && block.flags & mask_flag)
          clear_keys<Element, kTileKv, Config::kPanels, kPanel>(s.k[ring.stage], 0);

        wgmma_wait<0>();  // dQ of the block before is done: over its K, too
        pin(dq);
        if (read_stage >= 0) arrive(s.k_empty[read_stage]);
#pragma unroll
        for (int i = 0; i < kTileKv / 4; i++) ds_packed[i] = pack<Element>(scores[2 * i], scores[2 * i + 1]);
        stage = ring.stage;
        is_last = block.flags & kLastOfTile;
        ring.advance();
        if (is_last) break;
        mbarrier_wait(s.k_full[ring.stage], ring.parity);  // the next block
        block = s.block[ring.stage];
        if (block.flags & skip_flag) break;
        issue_scores();
        mbarrier_wait(s.v_full[ring.stage], ring.parity);
        issue_dp();
        issue_dq(stage);
        read_stage = stage;
      }
      issue_dq(stage);
      wgmma_wait<0>();
      pin(dq);
      arrive(s.k_empty[stage]);
    }

    // dQ leaves through the memory of dO.
    barrier_sync(kWarpgroup0Barrier + warpgroup, 128);  // this warpgroup has read its rows of dO
    FiniteTest<Element> test;
    const auto packed = [&](int i) { return pack<Element>(dq[i] * p.scale, dq[i + 1] * p.scale); };
#pragma unroll
    for (int i = 0; i < kD / 16; i++) {
      const uint32_t pairs[4] = {packed(8 * i), packed(8 * i + 2), packed(8 * i + 4), packed(8 * i + 6)};
      if (!kIsRepair) test.add_roughly(pairs[0], pairs[1]), test.add_roughly(pairs[2], pairs[3]);
      store_matrix_x4(s_grad_out + chunk(i), pairs[0], pairs[1], pairs[2], pairs[3]);
    }
    fence_proxy_async_shared();
    __syncwarp();
    if (lane == 0) {
#pragma unroll
      for (int panel = 0; panel < Config::kPanels; panel++)
        tma_store_4d(
            &maps.grad_q,
            shared_address(s.grad_out[grad_out_buffer]) + (warpgroup * Config::kPanels + panel) * kPanel + warp * 2048,
            panel * kPanelColumns, tile.query_tile * kTileQ + warpgroup * 64 + warp * 16, tile.head, tile.batch);
      bulk_commit();
    }
    const bool has_exact_stats = is_exact_stat(lse[0]) || is_exact_stat(lse[1]);
    if (!kIsRepair) s.repair.mark_if(has_exact_stats || !test.all_finite(), grad_out_buffer);
  }
  if (lane == 0) bulk_wait<0>();
}

template <class Config>
__device__ void init_dq_barriers(typename Config::SharedStorage& s) {
  ptx::mbarrier_init(s.q_full, 1), ptx::mbarrier_init(s.q_empty, Config::kConsumerWarps);
  for (uint64_t& barrier : s.grad_out_empty) ptx::mbarrier_init(barrier, Config::kConsumerWarps);
  init_ring(s.k_full, s.k_empty, Config::kConsumerWarps);
  init_ring(s.v_full, s.v_empty, Config::kConsumerWarps);
  ptx::fence_mbarrier_init();
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    flash_attention_backward_dq_kernel(const __grid_constant__ DqMaps maps, const __grid_constant__ BackwardParams p,
                                       const __grid_constant__ BackwardSchedule schedule) {
  using namespace ptx;
  extern __shared__ __align__(1024) unsigned char s_raw[];
  auto& s = *reinterpret_cast<typename Config::SharedStorage*>(s_raw);
  if (threadIdx.x == 0) {
    init_dq_barriers<Config>(s);
    s.repair.clear();
  }
  __syncthreads();
  launch_dependents();
  wait_for_previous_kernel();
  if (!has_work(p, schedule, BackwardForm::kTwoPass)) return;
  const auto begin_second_pass = [&] {
    return begin_repair<kPassBarrier, Config::kConsumers + 32>(s.repair, schedule.repair_list, false, [&] {
      invalidate_barriers(&s.q_full, s.v_empty + Config::kStages - 1);
      init_dq_barriers<Config>(s);
    });
  };
  if (threadIdx.x < 128) {
    lower_registers<Config::kProducerRegisters>();
    if (threadIdx.x >= 32) return;
    KeyProducer<Config, false>{maps, p, schedule, s}.run();
    if (begin_second_pass()) KeyProducer<Config, true>{maps, p, schedule, s}.run();
  } else {
    raise_registers<Config::kConsumerRegisters>();
    multiply_dq<Config, false>(maps, p, schedule, s);
    if (begin_second_pass()) multiply_dq<Config, true>(maps, p, schedule, *forget(&s));
  }
}

}  // namespace selfattn::cuda::sm90
