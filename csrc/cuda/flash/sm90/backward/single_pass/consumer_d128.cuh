// The consumer warpgroups of the single-pass backward kernel for head dimensions up to 128.
//
// A warpgroup owns 64 of the tile's 128 keys. It computes S^T = K Q^T and dP^T = V dO^T; P^T and dS^T stay in registers
// as left operands of dV += P^T dO and dK += dS^T Q. dS also goes to shared memory, where both warpgroups read it for
// dQ^T = K^T dS^T: at head dimension 128 each for 64 of the columns, at 64 each for 64 of the queries. dQ lags one
// block behind, so that a warpgroup need not wait for the other's dS of the same block: one multiplies while the other
// is at its exponentials.
#pragma once
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
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace selfattn::cuda::sm90 {

template <class Config>
__device__ __forceinline__ void multiply_d128(const BackwardMaps& maps, const BackwardParams& p,
                                              const BackwardSchedule& schedule, typename Config::SharedStorage& s) {
  using namespace ptx;
  using Element = typename Config::Element;
  constexpr int kD = Config::kHeadDim, kTileQ = Config::kTileQ, kTileKv = Config::kTileKv;
  constexpr int kQPanel = kTileQ * 128, kKvPanel = kTileKv * 128;  // bytes
  const auto [warpgroup, warp, lane] = WarpPlace(threadIdx.x);
  const float scale_log2 = p.scale * kLog2E;

  float dk[kD / 2], dv[kD / 2], scores[kTileQ / 2], dp[kTileQ / 2], dq[kDqTileRows / 2];
  uint32_t p_packed[kTileQ / 4], ds_packed[kTileQ / 4];
  HeldRows<Config::kHeldSteps> v_held;
  Ring<Config::kStages> ring;
  uint32_t tile_parity = 0;
  Ring<2> ds;

  const uint32_t s_k = shared_address(s.k), s_v = shared_address(s.v), s_q = shared_address(s.q),
                 s_do = shared_address(s.grad_out);
  const uint32_t s_ds = shared_address(s.grad_s);
  // Left operands: this warpgroup's rows of K and V; K transposed, the 64 columns of its share of dQ.
  const uint64_t k_rows = matrix_descriptor(s_k + warpgroup * 64 * 128),
                 v_rows = matrix_descriptor(s_v + warpgroup * 64 * 128);
  const uint64_t k_columns = matrix_descriptor(s_k + (kD == 128 ? warpgroup * kKvPanel : 0));
  // Right operands: Q and dO with queries as rows, and with queries as the summed dimension; dS.
  const uint64_t q_rows = matrix_descriptor(s_q), do_rows = matrix_descriptor(s_do);
  const uint64_t q_summed = matrix_descriptor(s_q, kQPanel), do_summed = matrix_descriptor(s_do, kQPanel);
  const uint64_t ds_rows = matrix_descriptor(s_ds + (kD == 64 ? warpgroup * kDqTileRows * 128 : 0));
  // Where this lane's row of an 8x8 matrix of dS^T goes, transposed: query (lane / 16 * 8 + lane % 8), 8 keys.
  const uint32_t s_ds_out =
      s_ds + warpgroup * kQPanel + (lane / 16 * 8 + lane % 8) * 128 + ((warp * 2 + lane / 8 % 2) ^ (lane % 8)) * 16;

  const auto hold_values = [&] {
    v_held.template load<kKvPanel>(s_v + (warpgroup * 64 + warp * 16 + lane % 16) * 128, lane);
  };
  const auto issue_scores = [&](int stage) {
    multiply_rows<Element, kD, kKvPanel, kQPanel>(scores, k_rows, q_rows + stage * operand_step(Config::kQueryBytes));
  };
  const auto issue_dp = [&](int stage) {
    multiply_rows<Element, kD, kKvPanel, kQPanel>(dp, v_rows, do_rows + stage * operand_step(Config::kQueryBytes),
                                                  v_held);
  };
  const auto issue_dv = [&](int stage) {
    accumulate<Element, kTileQ>(dv, p_packed, do_summed + stage * operand_step(Config::kQueryBytes));
  };
  const auto issue_dk = [&](int stage) {
    accumulate<Element, kTileQ>(dk, ds_packed, q_summed + stage * operand_step(Config::kQueryBytes));
  };
  const auto issue_dq = [&](int buffer) {
    const uint64_t right = ds_rows + buffer * operand_step(Config::kScoreBytes);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kTileKv / kProductStep; i++) {
      const uint64_t a = k_columns + i * operand_step(kProductStep * 128), b = right + operand_columns(i, kQPanel);
      if (i == 0)
        Wgmma<Element, kDqTileRows>::template ss_overwrite<true, false>(dq, a, b);
      else
        Wgmma<Element, kDqTileRows>::template ss<true, false>(dq, a, b);
    }
    wgmma_commit();
  };
  const auto arrive = [&](uint64_t& barrier) { arrive_by_warp(barrier, lane); };
  // Adds dQ of the block whose first row of dQ tiles is `dq_tile_row`, if it has one: out of the registers, or by TMA
  // out of this warp's slice of shared memory.
  const auto add_dq = [&](int dq_tile_row) {
    const int dq_tile = kD == 128 ? dq_tile_row * 2 + warpgroup : dq_tile_row + warpgroup;
    if constexpr (Config::kAddsByTma) {
      float* s_slice = reinterpret_cast<float*>(s.p_or_grad_v) + (warpgroup * 4 + warp) * kSliceFloats;
      if (lane == 0) bulk_wait_read<0>();  // what was sent from here before
      __syncwarp();
      store_slice(s_slice, lane, dq);
      fence_proxy_async_shared();
      __syncwarp();
      if (lane == 0 && dq_tile_row >= 0) {
        bulk_reduce_add(slice_of_dq_tile(schedule, dq_tile, warp), shared_address(s_slice), kSliceBytes);
        bulk_commit();
      }
    } else {
      if (dq_tile_row >= 0) add_slice(slice_of_dq_tile(schedule, dq_tile, warp), lane, dq);
    }
  };
  const auto mask_block = [&](const BlockInfo& block) {
    const int first_key = s.tile[0].key_tile * kTileKv + warpgroup * 64 + warp * 16 + lane / 4, column = 2 * (lane % 4);
    const RowIntervals rows = query_intervals(p, block.flags, s.tile[0].batch, first_key);
    mask_scores<kTileQ>(scores, p, rows, block.flags, s.tile[0].batch, first_key, block.query_tile * kTileQ + column,
                        &s.query_ids[ring.stage][column]);
  };
  // Clears what a masked pair of this block would bring into a sum: rows of Q and dO, and of this warp's keys.
  const auto clear_rows = [&](bool has_bad_keys) {
    clear_queries<kTileQ, Config::kPanels, kQPanel>(s.q[ring.stage], s.grad_out[ring.stage], s.row_stats[ring.stage]);
    if (has_bad_keys) clear_keys<Element, 16, Config::kPanels, kKvPanel>(s.k[0], warpgroup * 64 + warp * 16);
  };
  // S to P, packed, and to the slope weights (capped_weights.cuh). No logit is huge here (kCapOfSinglePass).
  const auto weigh_capped_block = [&](const BlockInfo& block, const float* stats, bool is_masked) {
    const bool has_bad_keys = __any_sync(~0u, !schedule.softcap.apply(scores));
    weigh_capped<Element, kTileQ>(scores, p_packed, schedule.softcap, stats);
    if (is_masked) {
      mask_block(block);
      clear_masked(scores, p_packed);
      if (has_bad_keys || block.flags & kExceptionalRows) [[unlikely]] {
        wgmma_wait<0>();  // V's registers are free for what follows
        pin(dp);
        clear_rows(has_bad_keys);
        hold_values();
      }
    }
  };
  // Writes this warp's 16 keys of dK or dV to its slice of shared memory and on to global memory.
  const auto store = [&](const CUtensorMap* map, float (&d)[kD / 2], float factor, unsigned char* slices,
                         const TileInfo& tile) {
    const uint32_t s_slice = shared_address(slices) + (warpgroup * 4 + warp) * (16 * kD * 2),
                   s_row = s_slice + lane % 16 * 128;
    store_rows<Element, 16 * 128>(s_row, lane, d, factor);
    fence_proxy_async_shared();
    __syncwarp();
    if (lane == 0) {
#pragma unroll
      for (int panel = 0; panel < Config::kPanels; panel++) {
        tma_store_4d(map, s_slice + panel * (16 * 128), panel * kPanelColumns,
                     tile.key_tile * kTileKv + warpgroup * 64 + warp * 16, tile.head, tile.batch);
      }
      bulk_commit();
    }
  };

  for (;; tile_parity ^= 1) {
#pragma unroll
    for (int i = 0; i < kD / 2; i++) dk[i] = dv[i] = 0.f;
    pin(dk), pin(dv);
    mbarrier_wait(s.k_full[0], tile_parity);
    if (s.tile[0].key_tile < 0) break;
    mbarrier_wait(s.q_full[ring.stage], ring.parity);
    issue_scores(ring.stage);
    mbarrier_wait(s.v_full[0], tile_parity);
    hold_values();
    mbarrier_wait(s.grad_out_full[ring.stage], ring.parity);
    issue_dp(ring.stage);
    if (lane == 0) bulk_wait_read<0>();  // dK of the tile before has left the memory of dS
    __syncwarp();
    barrier_sync(kConsumerBarrier, Config::kConsumers);

    int dq_tile_row_before =
        -1;  // of the block before. The first block of a tile multiplies an old dS that nobody adds.
    bool is_first = true;
#pragma unroll 1
    for (;;) {  // on entry S and dP are in flight; no branch may stand between the issue of dQ and the wait for it
                // (C7514)
      const BlockInfo& block = s.block[ring.stage];
      const float* stats = &s.row_stats[ring.stage][2 * (lane % 4)];
      const int flags = block.flags;
      const bool is_masked = flags & (kMaskWarpgroup0 << warpgroup);
      wgmma_wait<1>();
      pin(scores);
      if constexpr (Config::kHasSoftcap) {
        weigh_capped_block(block, stats, is_masked);
      } else {
        take_exponents<kTileQ>(scores, stats, scale_log2);
        if (flags & (kMaskWarpgroup0 << warpgroup | kExceptionalRows)) {
          const bool has_bad_keys = __any_sync(~0u, is_masked && is_any_non_finite(scores[0], scores[2]));
          if (is_masked) mask_block(block);
          if (has_bad_keys || flags & kExceptionalRows) [[unlikely]] {
            wgmma_wait<0>();  // V's registers are free for what follows
            pin(dp);
            if (flags & kExceptionalRows)
              refine_exponents<kTileQ>(scores, p, schedule, stats, block.head,
                                       block.query_tile * kTileQ + 2 * (lane % 4));
            if (is_masked) clear_rows(has_bad_keys);
            hold_values();
          }
        }
#pragma unroll
        for (int i = 0; i < kTileQ / 2; i += 2) {
          scores[i] = exp2_approx(scores[i]), scores[i + 1] = exp2_approx(scores[i + 1]);
          p_packed[i / 2] = pack<Element>(scores[i], scores[i + 1]);
        }
      }
      issue_dv(ring.stage);
      wgmma_wait<1>();
      pin(dp);
      if (flags & kLastOfTile) arrive(s.v_empty[0]);
      if (is_masked && __any_sync(~0u, flags & kExceptionalRows || is_any_non_finite(dp[0], dp[2]))) [[unlikely]]
        clear_products_without_weight(scores, dp);
      pack_score_gradients<Element, kTileQ>(scores, dp, stats, ds_packed);
      mbarrier_wait(s.grad_s_empty[ds.stage], ds.parity ^ 1);
#pragma unroll
      for (int i = 0; i < kTileQ / 16; i++) {
        store_matrix_x4_transposed(s_ds_out + ds.stage * Config::kScoreBytes + i * (16 * 128), ds_packed[4 * i],
                                   ds_packed[4 * i + 1], ds_packed[4 * i + 2], ds_packed[4 * i + 3]);
      }
      fence_proxy_async_shared();
      arrive(s.grad_s_full[ds.stage]);
      const Ring<2> ds_before = ds.previous();
      mbarrier_wait(s.grad_s_full[ds_before.stage], ds_before.parity);
      issue_dq(ds_before.stage);
      issue_dk(ring.stage);
      wgmma_wait<1>();
      pin(dq);
      arrive(s.grad_out_empty[ring.stage]);
      if (!is_first) arrive(s.grad_s_empty[ds_before.stage]);
      is_first = false;
      const int dq_tile_row = dq_tile_row_before;
      dq_tile_row_before = block.dq_tile_row;
      const bool is_last = flags & kLastOfTile;
      if (!Config::kScoresBeforeAdding || is_last) add_dq(dq_tile_row);
      if (is_last) break;
      ds.advance();
      const Ring before = ring;
      ring.advance();
      mbarrier_wait(s.q_full[ring.stage], ring.parity);
      if constexpr (Config::kHeldSteps > 0) {  // dS gives its registers back
        wgmma_wait<0>();
        pin(dk);
      }
      issue_scores(ring.stage);
      if constexpr (Config::kScoresBeforeAdding) add_dq(dq_tile_row);
      if constexpr (Config::kHeldSteps == 0) wgmma_wait<1>();
      arrive(s.q_empty[before.stage]);
      mbarrier_wait(s.grad_out_full[ring.stage], ring.parity);
      issue_dp(ring.stage);
    }
    mbarrier_wait(s.grad_s_full[ds.stage], ds.parity);
    if constexpr (Config::kHeldSteps > 0) {
      wgmma_wait<0>();
      pin(dk);
    }
    issue_dq(ds.stage);
    wgmma_wait<0>();
    pin(dq), pin(dk), pin(dv);
    arrive(s.grad_s_empty[ds.stage]);
    ds.advance();
    const TileInfo tile = s.tile[0];
    arrive(s.k_empty[0]);
    arrive(s.q_empty[ring.stage]);
    ring.advance();
    add_dq(dq_tile_row_before);
    barrier_sync(kConsumerBarrier, Config::kConsumers);  // both warpgroups are done with dS
    if (lane == 0) bulk_wait_read<0>();                  // dV of the tile before
    __syncwarp();
    store(&maps.grad_v, dv, 1.f, s.p_or_grad_v, tile);
    store(&maps.grad_k, dk, p.scale, &s.grad_s[0][0], tile);
    report_tile<Config::kAddsByTma>(schedule, tile.section, lane);
  }
  if (lane == 0) bulk_wait<0>();
}

}  // namespace selfattn::cuda::sm90
