// The consumer warpgroups of the single-pass backward kernel for head dimensions up to 256.
//
// dK and dV of 64 keys fill half of the registers, so P and dS go through shared memory. Each warpgroup computes S^T =
// K Q^T and dP^T = V dO^T for all 64 keys and its 32 of the 64 queries, writes P^T and dS^T as rows of keys, and takes
// its 128 columns of dV += P^T dO, dK += dS^T Q and dQ^T = K^T dS^T. The tensor cores work on the next S, dP and
// the second half of dQ while the exponentials run.
#pragma once
#include <type_traits>
#include "dq_accumulator.cuh"
#include "flash/sm90/backward/capped_weights.cuh"
#include "flash/sm90/backward/config.cuh"
#include "flash/sm90/backward/exceptional.cuh"
#include "flash/sm90/backward/mask.cuh"
#include "flash/sm90/backward/products.cuh"
#include "flash/sm90/backward/query_producer.cuh"
#include "ptx/arithmetic.cuh"
#include "ptx/barrier.cuh"
#include "ptx/fence.cuh"
#include "ptx/matrix.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/register.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace selfattn::cuda::sm90 {

template <class Config>
__device__ __forceinline__ void multiply_d256(const BackwardMaps& maps, const BackwardParams& p,
                                              const BackwardSchedule& schedule, typename Config::SharedStorage& s) {
  using namespace ptx;
  using Element = typename Config::Element;
  constexpr int kD = Config::kHeadDim, kTileQ = Config::kTileQ, kTileKv = Config::kTileKv;
  constexpr int kPanelBytes = 64 * 128;  // 64 rows, of every operand
  constexpr int kOwnQueries = 32, kOwnPanels = 2, kOwnColumns = kOwnPanels * kPanelColumns;
  static_assert(kTileQ == 64 && kTileKv == 64 && kD == 2 * kOwnColumns);
  const auto [warpgroup, warp, lane] =
      WarpPlace(forget(threadIdx.x));  // or ptxas reads the register anew at every use in the loop
  const float scale_log2 = p.scale * kLog2E;

  float dk[kOwnColumns / 2], dv[kOwnColumns / 2], scores[kOwnQueries / 2], dp[kOwnQueries / 2], dq[kDqTileRows / 2];
  Ring<Config::kStages> ring;
  uint32_t tile_parity = 0;
  int buffer = 0;  // of P and dS

  const uint32_t s_k = shared_address(s.k), s_v = shared_address(s.v), s_q = shared_address(s.q),
                 s_do = shared_address(s.grad_out);
  const uint32_t s_p = shared_address(s.p_or_grad_v), s_ds = shared_address(s.grad_s);
  const uint32_t own_panels = warpgroup * kOwnPanels * kPanelBytes, own_rows = warpgroup * kOwnQueries * 128;
  // Rows of K and V, all; of Q and dO, this warpgroup's queries.
  const uint64_t k_rows = matrix_descriptor(s_k), v_rows = matrix_descriptor(s_v);
  const uint64_t q_rows = matrix_descriptor(s_q + own_rows), do_rows = matrix_descriptor(s_do + own_rows);
  // Of this warpgroup's columns: K transposed, the first 64; Q and dO with queries as the summed dimension, all.
  const uint64_t k_columns = matrix_descriptor(s_k + own_panels);
  const uint64_t q_summed = matrix_descriptor(s_q + own_panels, kPanelBytes),
                 do_summed = matrix_descriptor(s_do + own_panels, kPanelBytes);
  const uint64_t p_keys = matrix_descriptor(s_p), ds_keys = matrix_descriptor(s_ds);
  // Where this lane's row of an 8x8 matrix of P^T or dS^T goes: a key, 8 queries.
  const uint32_t score_out = (warp * 16 + lane / 8 % 2 * 8 + lane % 8) * 128;
  const auto score_chunk = [&](int i) { return ((warpgroup * 4 + 2 * i + lane / 16) ^ (lane % 8)) * 16; };

  const auto issue_scores = [&](int stage) {
    multiply_rows<Element, kD, kPanelBytes, kPanelBytes>(scores, k_rows,
                                                         q_rows + stage * operand_step(Config::kQueryBytes));
  };
  const auto issue_dp = [&](int stage) {
    multiply_rows<Element, kD, kPanelBytes, kPanelBytes>(dp, v_rows,
                                                         do_rows + stage * operand_step(Config::kQueryBytes));
  };
  const auto accumulate = [&](float (&d)[kOwnColumns / 2], uint64_t left, uint64_t right) {  // over queries
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kTileQ / kProductStep; i++)
      Wgmma<Element, kOwnColumns>::template ss<false, true>(d, left + i * operand_step(32),
                                                            right + i * operand_step(kProductStep * 128));
    wgmma_commit();
  };
  const auto issue_dv = [&](int stage) {
    accumulate(dv, p_keys + buffer * operand_step(Config::kScoreBytes),
               do_summed + stage * operand_step(Config::kQueryBytes));
  };
  const auto issue_dk = [&](int stage) {
    accumulate(dk, ds_keys + buffer * operand_step(Config::kScoreBytes),
               q_summed + stage * operand_step(Config::kQueryBytes));
  };
  const auto issue_dq = [&](int panel) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kTileKv / kProductStep; i++) {
      const uint64_t a = k_columns + operand_step(panel * kPanelBytes + i * kProductStep * 128);
      const uint64_t b = ds_keys + operand_step(buffer * Config::kScoreBytes + i * kProductStep * 128);
      if (i == 0)
        Wgmma<Element, kDqTileRows>::template ss_overwrite<true, true>(dq, a, b);
      else
        Wgmma<Element, kDqTileRows>::template ss<true, true>(dq, a, b);
    }
    wgmma_commit();
  };
  const auto arrive = [&](uint64_t& barrier) { arrive_by_warp(barrier, lane); };
  const auto add_dq = [&](int dq_tile_row, int panel) {
    const int dq_tile = dq_tile_row * Config::kPanels + warpgroup * kOwnPanels + panel;
    if (dq_tile_row >= 0) add_slice(slice_of_dq_tile(schedule, dq_tile, warp), lane, dq);
  };
  const auto report_added = [&](int stage) {  // both halves of dQ
    if (p.is_deterministic && stage >= 0) __syncwarp(), arrive(s.added[stage]);
  };
  const auto mask_block = [&](const BlockInfo& block) {
    const int first_key = s.tile[0].key_tile * kTileKv + warp * 16 + lane / 4,
              column = warpgroup * kOwnQueries + 2 * (lane % 4);
    const RowIntervals rows = query_intervals(p, block.flags, s.tile[0].batch, first_key);
    mask_scores<kOwnQueries>(scores, p, rows, block.flags, s.tile[0].batch, first_key,
                             block.query_tile * kTileQ + column, &s.query_ids[ring.stage][column]);
  };
  const auto store_score_gradients = [&](const float* stats, uint32_t out) {
    uint32_t packed[kOwnQueries / 4];
    pack_score_gradients<Element, kOwnQueries>(scores, dp, stats, packed);
#pragma unroll
    for (int i = 0; i < kOwnQueries / 16; i++)
      store_matrix_x4(s_ds + out + score_chunk(i), packed[4 * i], packed[4 * i + 1], packed[4 * i + 2],
                      packed[4 * i + 3]);
  };
  // Clears what a masked pair of this block would bring into a sum: rows of Q and dO, and of the warp's 16 keys.
  const auto clear_rows = [&](bool has_bad_keys) {
    clear_queries<kTileQ, Config::kPanels, kPanelBytes>(s.q[ring.stage], s.grad_out[ring.stage],
                                                        s.row_stats[ring.stage]);
    if (has_bad_keys) clear_keys<Element, 16, Config::kPanels, kPanelBytes>(s.k[0], warp * 16);
  };
  // S to P, in shared memory, and to the slope weights (capped_weights.cuh).
  const auto weigh_capped_block = [&](const BlockInfo& block, const float* stats, uint32_t out, auto is_ordinary) {
    uint32_t packed[kOwnQueries / 4];
    const bool has_bad_keys = __any_sync(~0u, !schedule.softcap.apply(scores));
    constexpr bool kIsOrdinary = decltype(is_ordinary)::value;
    if (!kIsOrdinary && block.flags & kExceptionalRows) [[unlikely]]
      weigh_capped_exactly<Element, kOwnQueries>(scores, packed, p, schedule.softcap, stats, block.head,
                                                 block.query_tile * kTileQ + warpgroup * kOwnQueries + 2 * (lane % 4));
    else
      weigh_capped<Element, kOwnQueries>(scores, packed, schedule.softcap, stats);
    if (!kIsOrdinary && block.flags & (kMaskWarpgroup0 << warpgroup)) {
      mask_block(block);
      clear_masked(scores, packed);
      if (has_bad_keys || block.flags & kExceptionalRows) [[unlikely]]
        clear_rows(has_bad_keys);
    }
#pragma unroll
    for (int i = 0; i < kOwnQueries / 16; i++)
      store_matrix_x4(s_p + out + score_chunk(i), packed[4 * i], packed[4 * i + 1], packed[4 * i + 2],
                      packed[4 * i + 3]);
  };
  // This warpgroup's columns of dK or dV: into panels of shared memory, on to global memory, memory freed.
  const auto store = [&](const CUtensorMap* map, float (&d)[kOwnColumns / 2], float factor, uint32_t s_panels,
                         const TileInfo& tile, uint64_t& freed) {
    const uint32_t s_row = s_panels + own_panels + (warp * 16 + lane % 16) * 128;
    store_rows<Element, kPanelBytes>(s_row, lane, d, factor);
    fence_proxy_async_shared();
    barrier_sync(kWarpgroup0Barrier + warpgroup, 128);
    if (warp == 0 && lane == 0) {
      for (int panel = 0; panel < kOwnPanels; panel++) {
        const int column_panel = warpgroup * kOwnPanels + panel;
        tma_store_4d(map, s_panels + column_panel * kPanelBytes, column_panel * kPanelColumns, tile.key_tile * kTileKv,
                     tile.head, tile.batch);
      }
      bulk_commit();
      bulk_wait_read<0>();
      mbarrier_arrive(freed);
    }
  };

  for (;; tile_parity ^= 1) {
#pragma unroll
    for (int i = 0; i < kOwnColumns / 2; i++) dk[i] = dv[i] = 0.f;
    pin(dk), pin(dv);
    mbarrier_wait(s.k_full[0], tile_parity);
    const TileInfo tile = s.tile[0];
    if (tile.key_tile < 0) break;
    mbarrier_wait(s.q_full[ring.stage], ring.parity);
    issue_scores(ring.stage);
    mbarrier_wait(s.v_full[0], tile_parity);
    mbarrier_wait(s.grad_out_full[ring.stage], ring.parity);
    issue_dp(ring.stage);

    wgmma_commit();  // in the place of dQ
    int read_stage = -1, dq_tile_row_before = -1;

#pragma unroll 1
    for (;;) {  // on entry S, dP and the second half of dQ of the block before are in flight
      const BlockInfo& block = s.block[ring.stage];
      const float* stats = &s.row_stats[ring.stage][warpgroup * kOwnQueries + 2 * (lane % 4)];
      const int flags = block.flags;
      const bool is_masked = flags & (kMaskWarpgroup0 << warpgroup);
      wgmma_wait<2>();
      pin(scores);
      if (read_stage >= 0) arrive(s.q_empty[read_stage]), arrive(s.grad_out_empty[read_stage]);
      const uint32_t out = score_out + buffer * Config::kScoreBytes;
      // P and dS. Blocks that are neither masked nor out of the ordinary have a path of their own, without a branch.
      const auto weigh = [&](auto is_ordinary) {
        constexpr bool kIsOrdinary = decltype(is_ordinary)::value;
        if constexpr (Config::kHasSoftcap)
          weigh_capped_block(block, stats, out, is_ordinary);
        else
          take_exponents<kOwnQueries>(scores, stats, scale_log2);
        if constexpr (!kIsOrdinary && !Config::kHasSoftcap) {
          const bool has_bad_keys = __any_sync(~0u, is_masked && is_any_non_finite(scores[0], scores[2]));
          if (is_masked) mask_block(block);
          if (has_bad_keys || flags & kExceptionalRows) [[unlikely]] {
            if (flags & kExceptionalRows)
              refine_exponents<kOwnQueries>(scores, p, schedule, stats, block.head,
                                            block.query_tile * kTileQ + warpgroup * kOwnQueries + 2 * (lane % 4));
            if (is_masked) clear_rows(has_bad_keys);
          }
        }
#pragma unroll
        for (int i = 0; i < kOwnQueries / 16 && !Config::kHasSoftcap; i++) {
          float* r = &scores[8 * i];
#pragma unroll
          for (int j = 0; j < 8; j++) r[j] = exp2_approx(r[j]);
          store_matrix_x4(s_p + out + score_chunk(i), pack<Element>(r[0], r[1]), pack<Element>(r[2], r[3]),
                          pack<Element>(r[4], r[5]), pack<Element>(r[6], r[7]));
        }
        wgmma_wait<1>();
        pin(dp);
        if (!kIsOrdinary && is_masked && __any_sync(~0u, flags & kExceptionalRows || is_any_non_finite(dp[0], dp[2])))
            [[unlikely]]
          clear_products_without_weight(scores, dp);
        store_score_gradients(stats, out);
        fence_proxy_async_shared();
        wgmma_wait<0>();
        pin(dq);
      };
      if (flags & (kMaskWarpgroup0 << warpgroup | kExceptionalRows)) [[unlikely]]
        weigh(std::false_type{});
      else
        weigh(std::true_type{});
      add_dq(dq_tile_row_before, 1);
      report_added(read_stage);
      barrier_sync(kConsumerBarrier, Config::kConsumers);
      issue_dq(0);
      issue_dv(ring.stage);
      issue_dk(ring.stage);
      wgmma_wait<2>();
      pin(dq);
      dq_tile_row_before = block.dq_tile_row;
      const Ring before = ring;
      read_stage = ring.stage;
      ring.advance();
      const auto add_first_half = [&] {
        if (p.is_deterministic) mbarrier_wait(s.may_add[before.stage], before.parity);
        add_dq(dq_tile_row_before, 0);
      };
      if (flags & kLastOfTile) {
        add_first_half();
        break;
      }
      mbarrier_wait(s.q_full[ring.stage], ring.parity);
      issue_scores(ring.stage);
      add_first_half();
      mbarrier_wait(s.grad_out_full[ring.stage], ring.parity);
      issue_dp(ring.stage);
      issue_dq(1);
      buffer ^= 1;
    }
    issue_dq(1);
    buffer ^= 1;
    wgmma_wait<0>();
    pin(dq);
    arrive(s.q_empty[read_stage]), arrive(s.grad_out_empty[read_stage]);
    add_dq(dq_tile_row_before, 1);
    report_added(read_stage);
    pin(dk), pin(dv);
    store(&maps.grad_v, dv, 1.f, s_v, tile, s.v_empty[0]);  // every dP is done, since the last barrier
    barrier_sync(kConsumerBarrier, Config::kConsumers);     // and now every dQ, the last to read K
    store(&maps.grad_k, dk, p.scale, s_k, tile, s.k_empty[0]);
    report_tile<Config::kAddsByTma>(schedule, tile.section, lane);
  }
  if (lane == 0) bulk_wait<0>();
}

}  // namespace selfattn::cuda::sm90
