// A consumer warpgroup of the forward kernel: 64 query rows of a tile after the other.
//
// A step issues S = Q K^T of a block, then O += P V of the block before, and does the softmax of S while the second
// product runs. Where there are two buffers of Q, the first S of a tile is issued with the last P V of the tile before.
//
// ptxas moves the wait for a product up over arithmetic unless a basic block ends before it. That is why the
// exponentials are cut in two by the wait on the barrier of V, and why no path skips a product that another path
// issues.
#pragma once
#include <type_traits>

#include "flash/sm90/pipeline.cuh"
#include "flash/tile/capped_softmax.cuh"
#include "flash/tile/key_blocks.cuh"
#include "flash/tile/mask.cuh"
#include "flash/tile/online_softmax.cuh"
#include "params.cuh"
#include "ptx/barrier.cuh"
#include "ptx/fence.cuh"
#include "ptx/matrix.cuh"
#include "ptx/register.cuh"
#include "ptx/wgmma.cuh"
#include "repair.cuh"

namespace selfattn::cuda::sm90 {

// kIsRepair: the second pass over tiles that the first could not get right (repair.cuh).
template <class Config, bool kIsRepair>
__device__ __forceinline__ void multiply_tiles(const ForwardKernelParams& p, typename Config::SharedStorage& s, int w) {
  constexpr int kTileKey = Config::kTileKey, kDimQk = Config::kDimQk, kDimV = Config::kDimV;
  constexpr bool kHasSoftcap = Config::kHasSoftcap;
  constexpr int kGroups = kTileKey / 8, kEarly = kGroups * Config::kEarlySixteenths / 16;
  constexpr bool kMasked = Config::kMask == MaskKind::kMasked, kLimited = Config::kMask != MaskKind::kFull;
  constexpr int kPingPongThreads = 2 * kWarpgroupSize;
  using ScoreProduct = ptx::Wgmma<typename Config::Element, kTileKey>;
  using OutProduct = ptx::Wgmma<typename Config::Element, kDimV>;
  const int thread = kIsRepair ? ptx::forget(threadIdx.x) : threadIdx.x;
  const int warp = thread / kWarpSize % 4, lane = thread % kWarpSize;
  const int offset = p.shape.key_length - p.shape.query_length;

  Ring<Config::kKeyStages> k;
  Ring<Config::kValueStages> v;
  Ring<Config::kQueryStages> q;
  float scores[kTileKey / 2], out[kDimV / 2];
  uint32_t weights[kTileKey / 4];                              // P, packed as the left operand of P V
  uint32_t query[Config::kQueryInRegisters ? kDimQk / 4 : 1];  // Q, as the left operand of Q K^T
  std::conditional_t<kHasSoftcap, CappedSoftmax<kTileKey>, OnlineSoftmax<kTileKey>> softmax;
  const float logit_scale = p.logit_scale<Config>();
  softmax.c = logit_scale * kLog2E;

  const int row_in_tile =
      w * kWarpgroupRows + warp * 16 + lane / 4;  // the lane's rows: this one and the eighth after it
  Interval shared_keys{0, p.shape.key_length};    // seen by all 64 rows of the tile in work
  KeyBlock block{};

  const uint64_t query_operand = ptx::matrix_descriptor(ptx::shared_address(s.q[0][w])),
                 key_operand = ptx::matrix_descriptor(ptx::shared_address(s.k[0]));
  const uint64_t value_operand = ptx::matrix_descriptor(ptx::shared_address(s.v[0]), Config::kKeyPanelBytes);
  // Row lane % 16 of the warp's 16 rows and the chunk of 8 columns that matrix instructions take from this lane.
  const uint32_t lane_row = (warp * 16 + lane % 16) * kPanelRowBytes;
  const auto chunk = [&](int i) { return ptx::swizzled_columns(i, lane, Config::kQueryPanelBytes); };

  const auto open_tile = [&]() -> bool {
    ptx::mbarrier_wait(s.q_full[q.stage], q.parity);
    if (s.tile[q.stage].index < 0) return false;
    if (!kMasked) block.index = s.tile[q.stage].end_block;
    if constexpr (Config::kQueryInRegisters) {
#pragma unroll
      for (int i = 0; i < kDimQk / 16; i++)
        ptx::load_matrix_x4(ptx::shared_address(s.q[q.stage][w]) + lane_row + chunk(i), query + 4 * i);
    }
    return true;
  };
  const auto keys_of = [&](int row_in_tile) {
    const QueryTile& tile = s.tile[q.stage];
    const Interval window =
        keys_of_query(p.window, tile.index * Config::kTileQuery + row_in_tile, offset, p.shape.key_length);
    if (!kMasked || tile.mode != kContiguous) return window;
    return window & Interval{s.row_table[q.stage][0][row_in_tile], s.row_table[q.stage][1][row_in_tile]};
  };
  const auto find_shared_keys = [&] {
    if (kLimited) shared_keys.end = keys_of(w * kWarpgroupRows).end;
    if (kMasked) shared_keys.begin = keys_of(w * kWarpgroupRows + kWarpgroupRows - 1).begin;
  };
  const auto next_block = [&] {
    ptx::mbarrier_wait(s.k_full[k.stage], k.parity);
    if (kMasked)
      block = KeyBlock::decode(s.block_message[k.stage]);
    else
      block.index--, block.is_last = block.index == 0;
  };
  const auto issue_scores = [&] {  // S = Q K^T
    const uint64_t a = query_operand + q.stage * ptx::operand_step(Config::kQueryBytes),
                   b = key_operand + k.stage * ptx::operand_step(Config::kKeyBytes);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kDimQk / 16; i++) {
      const uint64_t bi = b + ptx::operand_columns(i, Config::kKeyPanelBytes);
      if constexpr (Config::kQueryInRegisters) {
        if (i == 0)
          ScoreProduct::template rs_overwrite<>(scores, query, bi);
        else
          ScoreProduct::template rs<>(scores, query + 4 * i, bi);
      } else {
        const uint64_t ai = a + ptx::operand_columns(i, Config::kQueryPanelBytes);
        if (i == 0)
          ScoreProduct::template ss_overwrite<>(scores, ai, bi);
        else
          ScoreProduct::template ss<>(scores, ai, bi);
      }
    }
    ptx::wgmma_commit();
  };
  const auto issue_out = [&] {  // O += P V
    const uint64_t b = value_operand + v.stage * ptx::operand_step(Config::kValueBytes);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kTileKey / 16; i++)
      OutProduct::template rs<true>(out, weights + 4 * i, b + i * ptx::operand_step(16 * kPanelRowBytes));
    ptx::wgmma_commit();
  };
  const auto release_key = [&] {
    if (kMasked) __syncwarp();  // all lanes have read the block's message
    if (lane == 0) ptx::mbarrier_arrive(s.k_empty[k.stage]);
    k.advance();
  };
  const auto release_value = [&] {
    if (lane == 0) ptx::mbarrier_arrive(s.v_empty[v.stage]);
    v.advance();
  };
  // Scores become what the softmax takes: codes, with softcap, and masked.
  const auto mask_scores = [&] {
    if constexpr (kHasSoftcap) softmax.encode(p.softcap, scores);
    const int first_key = block.index * kTileKey, first_column = first_key + 2 * (lane % 4);
    if (first_key + kTileKey > shared_keys.end || (kMasked && first_key < shared_keys.begin)) {
      const Interval keys[2] = {keys_of(row_in_tile), keys_of(row_in_tile + 8)};
      mask_by_intervals<kMasked>(scores, keys, first_column);
    }
    if (kMasked && block.by_ids) {
      const int b = s.tile[q.stage].head / p.shape.num_heads;
      const int* s_ids = s.row_table[q.stage][0] + row_in_tile;
      const int ids[2] = {s_ids[0], s_ids[8]};
      mask_by_ids(scores, ids, p.segments.key_ids + size_t(b) * p.segments.pitch_key + first_column);
    }
  };
  const auto finish_out = [&] {
    ptx::wgmma_wait<0>();
    ptx::pin(out);
    release_value();
  };
  const auto take_max = [&](auto is_first) {
    constexpr bool kIsFirst = decltype(is_first)::value;
    if constexpr (kHasSoftcap)
      softmax.template take_max<kIsFirst>(p.softcap, scores);
    else
      softmax.template take_max<kIsFirst, kIsRepair>(scores);
  };
  const auto pack_weights = [&] {
#pragma unroll
    for (int i = 0; i < kTileKey / 4; i++)
      weights[i] = ptx::pack<typename Config::Element>(scores[2 * i], scores[2 * i + 1]);
  };
  // Scores become P, in two parts for a wait between them. `finish`: what makes the operand of P V of it, in the basic
  // block of the exponentials, to run between them.
  const auto exponentiate_first = [&](auto to) {
    constexpr int kTo = decltype(to)::value;
    if constexpr (!kHasSoftcap)
      softmax.template exponentiate<0, kTo>(scores);
    else if (kIsRepair || softmax.has_large())
      softmax.template exponentiate_any<kIsRepair>(p.softcap, scores);
    else
      softmax.template exponentiate<0, kTo>(p.softcap, scores);
  };
  const auto exponentiate_rest = [&](auto from, const auto& finish) {
    constexpr int kFrom = decltype(from)::value;
    if constexpr (!kHasSoftcap) {
      softmax.template exponentiate<kFrom, kGroups>(scores);
      finish();
    } else if (kIsRepair || softmax.has_large()) {
      finish();
    } else {
      softmax.template exponentiate<kFrom, kGroups>(p.softcap, scores);
      finish();
    }
  };
  const auto clear_out = [&] {
#pragma unroll
    for (int i = 0; i < kDimV / 2; i++) out[i] = 0.f;
  };
  const auto wait_for_ping_pong = [&] {
    if (Config::kPingPong) ptx::barrier_sync(Config::kPingPongBarrier + w, kPingPongThreads);
  };
  const auto pass_ping_pong = [&] {
    if (Config::kPingPong)
      ptx::barrier_arrive(Config::kPingPongBarrier + (w + 1) % Config::kWarpgroups, kPingPongThreads);
  };
  // V of the block just turned into P.
  const auto wait_value = [&](const Ring<Config::kValueStages>& ring) {
    ptx::pin(scores);
    ptx::mbarrier_wait(s.v_full[ring.stage], ring.parity);
  };
  struct OutFactors {
    float of_row[2];
    bool is_good_enough;
  };
  // The sums of a tile's rows are complete: writes lse, returns what their outputs are multiplied by.
  const auto finish_rows = [&](int stage) -> OutFactors {
    const int head = s.tile[stage].head, first_row = s.tile[stage].index * Config::kTileQuery + row_in_tile;
    OutFactors factors;
    factors.is_good_enough = softmax.is_good_enough(0) && softmax.is_good_enough(1);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float sum = softmax.state.sum[r];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const float max = softmax.max_score(r);
      const RowEnd end = p.sinks ? finish_row_with_sink(max, sum, logit_scale, p.sinks[head % p.shape.num_heads])
                                 : finish_row(max, sum, logit_scale);
      factors.of_row[r] = end.factor;
      const int row = first_row + 8 * r;
      if (lane % 4 == 0 && row < p.shape.query_length) p.lse[size_t(head) * p.shape.query_length + row] = end.lse;
    }
    return factors;
  };
  // Writes the output over this warpgroup's rows of Q and hands it to the storing warp. The first pass marks the tile
  // where a row has huge logits, or is not finite though the sum of its weights is.
  const auto send_out = [&](int stage, const OutFactors& factors) {
    const float f0 = factors.of_row[0], f1 = factors.of_row[1];
    ptx::FiniteTest<typename Config::Element> test0, test1;
    const auto packed = [&](int i, float f) { return ptx::pack<typename Config::Element>(out[i] * f, out[i + 1] * f); };
#pragma unroll
    for (int i = 0; i < kDimV / 16; i++) {
      const uint32_t o0 = packed(8 * i, f0), o1 = packed(8 * i + 2, f1), o2 = packed(8 * i + 4, f0),
                     o3 = packed(8 * i + 6, f1);
      if (!kIsRepair) test0.add_roughly(o0, o2), test1.add_roughly(o1, o3);
      ptx::store_matrix_x4(ptx::shared_address(s.q[stage][w]) + lane_row + chunk(i), o0, o1, o2, o3);
    }
    const bool is_spoilt = (!test0.all_finite() && f0 == f0) || (!test1.all_finite() && f1 == f1);
    if constexpr (!kIsRepair) s.repair.mark_if(is_spoilt || !factors.is_good_enough, stage);
    ptx::fence_proxy_async_shared();
    ptx::mbarrier_arrive(s.out_full[stage][w]);
  };

  // S of the next block and P V of the last one. kIsFirst: the next block opens a tile, the last one closes that in Q
  // buffer `closing`. What stands between the two products runs while the first of them does.
  const auto step = [&](auto is_first, int closing) {
    constexpr bool kIsFirst = decltype(is_first)::value;
    OutFactors factors;
    next_block();  // waits until the producer's K is there
    if (kIsFirst) find_shared_keys();

    wait_for_ping_pong();  // until the other warpgroup has issued its products
    issue_scores();
    softmax.rescale(out);
    if (kIsFirst && !Config::kPingPong) factors = finish_rows(closing);
    issue_out();
    pass_ping_pong();
    if (kIsFirst && Config::kPingPong) factors = finish_rows(closing);  // others have the tensor cores meanwhile

    ptx::wgmma_wait<1>();  // S is done, P V still runs
    ptx::pin(scores);
    release_key();  // the producer may load over K
    mask_scores();
    take_max(is_first);
    exponentiate_first(std::integral_constant<int, kEarly>{});

    wait_value(v.next());                      // V of the block at hand, for the next step's P V
    finish_out();                              // P V is done: the producer may load over its V
    if (kIsFirst) send_out(closing, factors);  // to the storing warp, in the memory of Q
    exponentiate_rest(std::integral_constant<int, kEarly>{}, [&] {
      softmax.template take_sum<kIsFirst>();
      pack_weights();
    });
    if (kIsFirst) clear_out();
    if constexpr (kIsRepair) take_out_non_finite_values<Config>(s, v.stage, scores, out);
  };

  // A tile's first block with nothing to run beside it.
  const auto first_step = [&] {
    next_block();
    issue_scores();
    find_shared_keys();
    ptx::wgmma_wait<0>();
    ptx::pin(scores);
    release_key();
    mask_scores();
    take_max(std::true_type{});
    exponentiate_first(std::integral_constant<int, kGroups>{});
    softmax.template take_sum<true>();
    wait_value(v);
    pack_weights();
    clear_out();
    if constexpr (kIsRepair) take_out_non_finite_values<Config>(s, v.stage, scores, out);
  };

  // The last P V of the thread block's last tile, or of every tile where tiles do not overlap.
  const auto last_step = [&](int closing) {
    softmax.rescale(out);
    issue_out();
    const OutFactors factors = finish_rows(closing);
    finish_out();
    send_out(closing, factors);
  };

  if (!kIsRepair && w == Config::kWarpgroups - 1)
    pass_ping_pong();  // nobody has waited for the last hand-over of the first pass
  bool is_open = open_tile();
  if (Config::kOverlapsTiles && is_open) first_step();
  while (is_open) {
    if (!Config::kOverlapsTiles) first_step();
    while (!block.is_last) step(std::false_type{}, 0);
    const int closing = q.stage;
    q.advance();
    if constexpr (Config::kOverlapsTiles) {
      is_open = open_tile();
      if (is_open)
        step(std::true_type{}, closing);
      else
        last_step(closing);
    } else {
      last_step(closing);
      is_open = open_tile();
    }
  }
}

}  // namespace selfattn::cuda::sm90
