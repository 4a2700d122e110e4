// The warps that bring in the queries of pieces and finish what groups of warps have attended to, beside these: while
// they merge a piece, the groups are at the next one.
//
// Two pieces are under way at most, in turns of two slots:
//   begun:     finishers -> groups    the piece, and its queries, are there
//   attended:  groups -> finishers    their results are there, each group's in a slot of its ring that is lent
//   merged:    finishers -> groups    these have been read
#pragma once
#include "ptx/barrier.cuh"
#include "ptx/grid.cuh"
#include "ptx/launch.cuh"
#include "ptx/mbarrier.cuh"
#include "results.cuh"
#include "rows.cuh"

namespace selfattn::cuda::kv_cache {

struct PieceTurn {
  int slot = 0;
  unsigned parity = 0;

  __device__ __forceinline__ void advance() {
    slot ^= 1;
    if (slot == 0) parity ^= 1;
  }
};

// Where an element of a group's output is: the columns of a row stand in groups of 8, swizzled.
template <class Config>
__device__ __forceinline__ int place_of_output(int row, int column) {
  return (row * Config::kDim + row % 8 * 8 + column % 8) ^ (column / 8 * 8);
}

// Once all results of a piece are written, by some of the threads, which `sync` synchronises: merges those of the head
// tile where it was the last that was wanted.
template <class Config, class Sync>
__device__ __forceinline__ void end_piece(const KernelParams& p, const Parts& parts, const Walk& s_walk,
                                          int& s_is_last_arriver, int thread, const Sync& sync) {
  if (s_walk.is_whole() || !s_walk.piece.ends_part) return;
  if (parts.blocks > 1) {
    if (thread == 0) {
      ptx::wait_for_previous_kernel();  // it clears the counters
      const int before = ptx::add_acquire_release(p.schedule.counters + parts.first_block, 1);
      s_is_last_arriver = before == parts.blocks - 1;
    }
    sync();
  }
  if (parts.blocks == 1 || s_is_last_arriver) merge_parts<Config>(p, parts, s_walk, thread / kWarpSize);
}

template <class Config>
__device__ __forceinline__ void finish_pieces(const KernelParams& p, typename Config::SharedState& s_state,
                                              const Share& share, Walk& walk) {
  constexpr int kWidth = Config::kDim / kWarpSize, kThreads = Config::kFinishers * kWarpSize;
  const int thread = static_cast<int>(threadIdx.x) - Config::kWarps * kWarpSize;
  const int warp = thread / kWarpSize, lane = thread % kWarpSize;
  const auto sync = [] { ptx::barrier_sync(1, kThreads); };
  const float c = logit_scale(p) * kLog2E;

  bool has_piece = true;
  const auto begin_piece = [&](int slot) {
    has_piece = find_next(p, share, walk);
    if (thread == 0) s_state.has_piece[slot] = has_piece, s_state.pieces[slot] = walk;
    if (has_piece) load_query<Config>(p, walk, s_state.query[slot], thread, kThreads);
    ptx::mbarrier_arrive(s_state.begun[slot]);
  };
  begin_piece(0);
  if (has_piece) begin_piece(1);
#pragma unroll 1
  for (PieceTurn turn;; turn.advance()) {
    const int slot = turn.slot;
    ptx::mbarrier_wait(s_state.begun[slot], turn.parity);
    if (!s_state.has_piece[slot]) break;
    const Walk& piece = s_state.pieces[slot];
    const Parts parts(p, share, piece);
    ptx::mbarrier_wait(s_state.attended[slot], turn.parity);
#pragma unroll 1
    for (int row = warp; row < piece.tile.count; row += Config::kFinishers) {
      const SplitStats* s_stats = &s_state.stats[slot][0][row];
      RowMerge<kWidth> merge;
      float top = -infinity();
#pragma unroll
      for (int g = 0; g < Config::kKeyGroups; g++) top = fmaxf(top, s_stats[g * Config::kTileRows].x);
      merge.raise(top, c);
#pragma unroll
      for (int g = 0; g < Config::kKeyGroups; g++) {
        const float* s_out = s_state.outputs[slot][g];
        if (!s_out) continue;  // it had no slice
        float out[kWidth];
        load_columns(s_out + place_of_output<Config>(row, lane * kWidth), out, [](const auto* s) { return *s; });
        merge.add(s_stats[g * Config::kTileRows], out, c);
      }
      target_of<Config>(p, piece, parts, row, {merge.max, merge.sum}, lane == 0).store(lane * kWidth, merge.out);
    }
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(s_state.merged[slot]);
    sync();  // all results of the piece are written
    end_piece<Config>(p, parts, piece, s_state.is_last_arriver, thread, sync);
    sync();  // nobody looks at the slot's piece any more
    if (has_piece) begin_piece(slot);
  }
}

}  // namespace selfattn::cuda::kv_cache
