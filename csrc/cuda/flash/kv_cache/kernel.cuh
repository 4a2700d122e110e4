// One kernel reads the whole cache: as many thread blocks as the device holds at once, each with an equal share of the
// keys (schedule.cuh). A share is a row of pieces, a piece some keys of one tile of rows and one kv head.
//
//   each group of warps, on its own:  wait for a slice | S = Q K^T | softmax | O += P V | start the copies of the slice
//                                     that is a ring behind it, of whichever piece
//   at the end of a piece:            the groups' O -> shared memory | merge them -> the output, or a partial result
//   at the end of a split head tile:  the thread block that arrives last merges its partial results, in their order
//
// No barrier of the thread block stands between the slices. With several groups there are warps that finish pieces,
// too (finish.cuh): groups leave what they have and go on with the next piece, each when it can.
//
// A small call takes as long as its code takes to come from cold memory: what is there twice is a function, what few
// calls want stands apart, and loops are unrolled only inside a slice.
#pragma once
#include "finish.cuh"
#include "loader.cuh"
#include "ptx/barrier.cuh"
#include "ptx/launch.cuh"
#include "ptx/register.cuh"
#include "results.cuh"
#include "rows.cuh"

namespace selfattn::cuda::kv_cache {

// Until all copies but those of the last `slices` slices are there.
__device__ __forceinline__ void wait_for_all_but(int slices) {
  static_assert(Pipeline::kMostStages == 3);
  if (slices == 2)
    ptx::wait_for_copies<2>();
  else if (slices == 1)
    ptx::wait_for_copies<1>();
  else
    ptx::wait_for_copies<0>();
}

// A group's slots, which are filled and read in turn.
template <class Config>
class GroupRing {
 public:
  __device__ __forceinline__ GroupRing(const KernelParams& p, unsigned char* s_slots, Loader<Config>& loader)
      : s_slots_(s_slots), loader_(loader), stages_(p.stages), free_(p.stages) {}

  // Starts the copies of the next slices into all free slots but so many.
  __device__ __forceinline__ void load(int but = 0) {
#pragma unroll 1
    for (; free_ > but; free_--) {
      loader_.load_next(ptx::shared_address(s_slots_ + load_stage_ * Config::kSlotBytes));
      if (++load_stage_ == stages_) load_stage_ = 0;
    }
  }
  // Until the oldest slice is there; its slot.
  __device__ __forceinline__ unsigned char* wait() const {
    wait_for_all_but(stages_ - 1 - free_);
    sync();  // all of the group's copies are there
    return s_slots_ + stage_ * Config::kSlotBytes;
  }
  // It has been read.
  __device__ __forceinline__ void release() {
    sync();
    free_++;
    if (++stage_ == stages_) stage_ = 0;
  }

 private:
  static __device__ __forceinline__ void sync() {
    if constexpr (Config::kRowWarps == 1)
      __syncwarp();
    else
      ptx::barrier_sync(1 + threadIdx.x / Config::kGroupThreads, Config::kGroupThreads);
  }

  unsigned char* s_slots_;
  Loader<Config>& loader_;
  int stages_, free_, load_stage_ = 0, stage_ = 0;
};

// By the groups of a thread block that has finishers.
template <class Config>
__device__ __forceinline__ void attend_pieces(const KernelParams& p, typename Config::SharedState& s_state,
                                              GroupRing<Config>& ring) {
  using Rows = WarpRows<Config>;
  const int group = static_cast<int>(threadIdx.x) / Config::kGroupThreads;
  Rows rows(p, s_state.params);
  PieceTurn turn, turn_of_lent;
  bool is_first = true, is_at_begin = true;
  bool has_lent = false;            // a slot of the ring, to those who merge the piece before
  int slice = 0, last_slice = 0;    // of the piece, for this group
  unsigned char* s_read = nullptr;  // the slot that it read last
#pragma unroll 1
  for (;;) {
    ring.load(has_lent ? 1 : 0);
    const Walk& walk = s_state.pieces[turn.slot];
    if (is_at_begin) {
      if (is_first) ptx::barrier_sync(kBarriersBarrier, Config::kThreads);
      is_first = false;
      ptx::mbarrier_wait(s_state.begun[turn.slot], turn.parity);
      if (!s_state.has_piece[turn.slot]) break;
      rows.begin(walk);
      rows.take_query(ptx::shared_address(s_state.query[turn.slot]));
      slice = first_slice_of<Config>(walk.piece.keys, group);
      last_slice = (walk.piece.keys.end + Config::kSliceKeys - 1) / Config::kSliceKeys;
      s_read = nullptr, is_at_begin = false;
    }
    if (slice < last_slice) {
      s_read = ring.wait();
      rows.attend(s_read, slice * Config::kSliceKeys);
      ring.release();
      slice += Config::kKeyGroups;
    }
    if (has_lent) ptx::mbarrier_wait(s_state.merged[turn_of_lent.slot], turn_of_lent.parity);
    has_lent = false;
    if (slice < last_slice) continue;

    const int count = walk.tile.count;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const SplitStats stats = rows.stats(r);
      if (rows.lane() % 4 == 0) s_state.stats[turn.slot][group][rows.tile_row(r)] = stats;
    }
    auto* s_out = reinterpret_cast<float*>(s_read);
    if (s_read) {
      const int lane = ptx::forget(rows.lane()), row = lane / 4;  // what depends on it is wanted here alone
      const int first = place_of_output<Config>(row, lane % 4 * 2);
      const bool is_row[2] = {row < count, row + 8 < count};
      rows.give_output([&](int r, int eight, const float2& out) {
        if (is_row[r]) *reinterpret_cast<float2*>(s_out + (first ^ eight) + r * 8 * Config::kDim) = out;
      });
    }
    if (rows.lane() == 0) s_state.outputs[turn.slot][group] = s_out;
    __syncwarp();
    if (rows.lane() == 0) ptx::mbarrier_arrive(s_state.attended[turn.slot]);
    has_lent = s_read != nullptr, turn_of_lent = turn;
    is_at_begin = true;
    turn.advance();
  }
}

// By all warps of a thread block that has one group.
template <class Config>
__device__ __forceinline__ void attend_alone(const KernelParams& p, typename Config::SharedState& s_state,
                                             const Share& share, Walk& walk, bool has_piece, GroupRing<Config>& ring) {
  using Rows = WarpRows<Config>;
  const KernelParams& s_p = s_state.params;
  Rows rows(p, s_state.params);
  ring.load();
  ptx::wait_for_previous_kernel();  // it clears the counters
#pragma unroll 1
  for (; has_piece; has_piece = find_next(s_p, share, walk)) {
    load_query<Config>(s_p, walk, s_state.query[0], threadIdx.x, Config::kThreads);
    __syncthreads();  // the queries are there
    rows.begin(walk);
    rows.take_query(ptx::shared_address(s_state.query[0]));
    const int last_slice = (walk.piece.keys.end + Config::kSliceKeys - 1) / Config::kSliceKeys;
#pragma unroll 1
    for (int slice = walk.piece.keys.begin / Config::kSliceKeys; slice < last_slice; slice++) {
      rows.attend(ring.wait(), slice * Config::kSliceKeys);
      ring.release();
      ring.load();
    }
    const Parts parts(s_p, share, walk);
    const int count = walk.tile.count;
    const SplitStats stats[2] = {rows.stats(0), rows.stats(1)};
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = rows.tile_row(r);
      if (row >= count) continue;
      const auto target = target_of<Config>(s_p, walk, parts, row, stats[r], rows.lane() % 4 == 0);
      const int column = ptx::forget(rows.lane()) % 4 * 2;  // what depends on it is wanted here alone
      rows.give_output([&](int of_row, int eight, const float2& out) {
        if (of_row == r) target.template store<2>(eight + column, {out.x, out.y});
      });
    }
    __syncthreads();  // all results of the piece are written; the queries are free
    if (ends_head_tile(s_p, parts, walk, s_state.is_last_arriver, threadIdx.x, [] { __syncthreads(); }))
      merge_parts<Config>(s_p, parts, walk, static_cast<int>(threadIdx.x) / kWarpSize);
  }
}

// By so many threads, a word each.
template <class Value>
__device__ __forceinline__ void copy_words(const Value& source, Value& target, int thread, int threads) {
  static_assert(sizeof(Value) % sizeof(int) == 0);
#pragma unroll 1
  for (int i = thread; i < int(sizeof(Value) / sizeof(int)); i += threads)
    reinterpret_cast<int*>(&target)[i] = reinterpret_cast<const int*>(&source)[i];
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMostBlocks)
    flash_attention_kv_cache_kernel(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(128) unsigned char s_memory[];
  auto& s_state = *reinterpret_cast<typename Config::SharedState*>(s_memory + p.stages * Config::kStageBytes);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  // Functions read their parameters there: once they are here, nobody waits for memory that holds them.
  const KernelParams& s_p = s_state.params;
  copy_words(p, s_state.params, threadIdx.x, Config::kThreads);
  __syncthreads();
  // Each warp finds the share, and its first piece, for itself, but for those that finish pieces.
  Share& share = s_state.shares[warp];
  Walk& walk = s_state.walks[warp];
  bool has_piece = false;
  if (warp < Config::kWarps) {
    if (!p.schedule.is_prepared) prefetch_lengths(p.call);
    if (p.schedule.is_prepared) ptx::wait_for_previous_kernel();  // its schedule is there
    const Share found = find_share(s_p);
    if (lane == 0) share = found, walk = begin_walk(found);
    __syncwarp();
    has_piece = find_next(s_p, share, walk);
  }
  const int group = warp / Config::kRowWarps;
  unsigned char* s_slots = s_memory + group * p.stages * Config::kSlotBytes;
  if constexpr (Config::kFinishers > 0) {
    if (warp < Config::kWarps) {
      if (warp == 0) {
        copy_words(walk, s_state.pieces[0], lane, kWarpSize);
        if (lane == 0) s_state.has_piece[0] = has_piece;
      }
      ptx::barrier_arrive(kPieceBarrier, Config::kThreads);
      Loader<Config> loader(p, s_p, share, walk, has_piece);
      GroupRing<Config> ring(p, s_slots, loader);
      attend_pieces<Config>(p, s_state, ring);
    } else {
      finish_pieces<Config>(s_p, s_state, s_state.shares[0], walk);
    }
  } else {
    Walk& loading = s_state.loading[warp];
    if (lane == 0) loading = walk;
    __syncwarp();
    Loader<Config> loader(p, s_p, share, loading, has_piece);
    GroupRing<Config> ring(p, s_slots, loader);
    attend_alone<Config>(p, s_state, share, walk, has_piece, ring);
  }
  ptx::wait_for_previous_kernel();
  if (s_p.call.segment_ids) finish_queries_of_none(s_p);
}

}  // namespace selfattn::cuda::kv_cache
