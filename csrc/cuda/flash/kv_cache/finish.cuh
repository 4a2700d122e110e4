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

// Of finishers; of all: the barriers above are there; the first piece is.
constexpr int kFinishersBarrier = 1, kBarriersBarrier = 2, kPieceBarrier = 3;

struct PieceTurn {
  int slot = 0;
  unsigned parity = 0;

  __device__ __forceinline__ void advance() {
    slot ^= 1;
    if (slot == 0) parity ^= 1;
  }
};

// Where an element of a group's output is: the columns of a row stand in groups of 8, swizzled. Rows 8 apart lie
// 8 * kDim apart.
template <class Config>
__device__ __forceinline__ int place_of_output(int row, int column) {
  return (row * Config::kDim + row % 8 * 8 + column % 8) ^ (column / 8 * 8);
}

// Once all results of a piece are written, by some of the threads, which `sync` synchronises: whether those of the head
// tile are to be merged, since it was the last that was wanted.
template <class Sync>
__device__ __forceinline__ bool ends_head_tile(const KernelParams& p, const Parts& parts, const Walk& s_walk,
                                               int& s_is_last_arriver, int thread, const Sync& sync) {
  if (s_walk.is_whole() || !s_walk.piece.ends_part) return false;
  if (parts.blocks == 1) return true;
  if (thread == 0) {
    const int before = ptx::add_acquire_release(p.schedule.counters + parts.first_block, 1);
    s_is_last_arriver = before == parts.blocks - 1;
  }
  sync();
  return s_is_last_arriver;
}

// The results of a piece's groups become its own: some of the rows by each of the warps that finish it.
template <class Config>
__device__ __forceinline__ void merge_groups(const KernelParams& p, const SplitStats* s_stats,
                                             const float* const* outputs, const Parts& parts, const Walk& s_walk,
                                             int warp, int rows) {
  constexpr int kWidth = Config::kDim / kWarpSize;
  const float c = logit_scale(p) * kLog2E;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, column = lane * kWidth;
#pragma unroll 1
  for (int row = warp; row < rows; row += Config::kFinishers) {
    RowMerge<kWidth> merge;
    float top = -infinity();
#pragma unroll
    for (int g = 0; g < Config::kKeyGroups; g++) top = fmaxf(top, s_stats[g * Config::kTileRows + row].x);
    merge.raise(top, c);
#pragma unroll
    for (int g = 0; g < Config::kKeyGroups; g++) {
      const float* s_out = outputs[g];
      if (!s_out) continue;  // it had no slice
      float out[kWidth];
      load_columns(s_out + place_of_output<Config>(row, column), out, [](const auto* s) { return *s; });
      merge.add(s_stats[g * Config::kTileRows + row], out, c);
    }
    target_of<Config>(p, s_walk, parts, row, {merge.max, merge.sum}, lane == 0).store(column, merge.out);
  }
}

// `walk`: a place for the warp's own. The first piece, if there is one, is found by the groups.
template <class Config>
__device__ __forceinline__ void finish_pieces(const KernelParams& p, typename Config::SharedState& s_state,
                                              const Share& share, Walk& walk) {
  constexpr int kThreads = Config::kFinishers * kWarpSize;
  const int thread = static_cast<int>(threadIdx.x) - Config::kWarps * kWarpSize;
  const int warp = thread / kWarpSize, lane = thread % kWarpSize;
  const auto sync = [] { ptx::barrier_sync(kFinishersBarrier, kThreads); };
  if (thread == 0) {
#pragma unroll 1
    for (int slot = 0; slot < 2; slot++) {
      ptx::mbarrier_init(s_state.begun[slot], kThreads);
      ptx::mbarrier_init(s_state.attended[slot], Config::kWarps);
      ptx::mbarrier_init(s_state.merged[slot], Config::kFinishers);
    }
  }
  __syncwarp();
  ptx::barrier_arrive(kBarriersBarrier, Config::kThreads);
  ptx::barrier_sync(kPieceBarrier, Config::kThreads);

  if (lane == 0) walk = s_state.pieces[0];
  __syncwarp();
  bool has_piece = s_state.has_piece[0], is_first = true;
  int to_begin = 2;                 // slots
  ptx::wait_for_previous_kernel();  // it clears the counters
#pragma unroll 1
  for (PieceTurn turn;; turn.advance()) {
#pragma unroll 1
    for (; to_begin > 0; to_begin--) {
      if (has_piece && !is_first) has_piece = find_next(p, share, walk);
      const int slot = turn.slot ^ (to_begin == 1);
      if (thread == 0) s_state.has_piece[slot] = has_piece, s_state.pieces[slot] = walk;
      if (has_piece) load_query<Config>(p, walk, s_state.query[slot], thread, kThreads);
      ptx::mbarrier_arrive(s_state.begun[slot]);
      is_first = false;
    }
    const int slot = turn.slot;
    ptx::mbarrier_wait(s_state.begun[slot], turn.parity);
    if (!s_state.has_piece[slot]) break;
    const Walk& piece = s_state.pieces[slot];
    const Parts parts(p, share, piece);
    const int rows = piece.tile.count;
    ptx::mbarrier_wait(s_state.attended[slot], turn.parity);
    merge_groups<Config>(p, s_state.stats[slot][0], s_state.outputs[slot], parts, piece, warp, rows);
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(s_state.merged[slot]);
    sync();  // all results of the piece are written
    if (ends_head_tile(p, parts, piece, s_state.is_last_arriver, thread, sync))
      merge_parts<Config>(p, parts, piece, warp);
    sync();  // nobody looks at the slot's piece any more
    to_begin = 1;
  }
}

}  // namespace selfattn::cuda::kv_cache
