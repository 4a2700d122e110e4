// The kernel of tiles of 64 rows: as many thread blocks as the device holds at once, each with an equal share of the
// keys (schedule.cuh). A share is a row of pieces, a piece some keys of one tile of rows and one kv head. All warps
// read the same slices, and start the copies of the slice that is a ring behind, of whichever piece.
//
// A small call takes as long as its code takes to come from cold memory: what is there twice is a function, what few
// calls want stands apart, and loops are unrolled only inside a slice. Functions read their parameters from shared
// memory: once they are there, nobody waits for memory that holds them.
#pragma once
#include "chunk_loader.cuh"
#include "ptx/launch.cuh"
#include "ptx/register.cuh"
#include "results.cuh"
#include "rows.cuh"

namespace selfattn::cuda::kv_cache {

// Behind the ring.
template <class Config>
struct ChunkState {
  static_assert(Config::kKeyGroups == 1 && Config::kMostStages == 3);
  KernelParams params;
  alignas(128) unsigned char query[Config::Query::kBytes];
  Share shares[Config::kWarps];                         // the same in all
  Walk walks[Config::kWarps], loading[Config::kWarps];  // of what is attended to, and of what is loaded
  int is_last_arriver;

  static constexpr int shared_bytes(int stages) { return stages * Config::kStageBytes + int(sizeof(ChunkState)); }
};

// Until all copies but those of the last `slices` slices are there.
__device__ __forceinline__ void wait_for_all_but(int slices) {
  if (slices == 2)
    ptx::wait_for_copies<2>();
  else if (slices == 1)
    ptx::wait_for_copies<1>();
  else
    ptx::wait_for_copies<0>();
}

// Slots, which are filled and read in turn.
template <class Config>
class ChunkRing {
 public:
  __device__ __forceinline__ ChunkRing(const KernelParams& p, unsigned char* s_slots, ChunkLoader<Config>& loader)
      : s_slots_(s_slots), loader_(loader), stages_(p.stages), free_(p.stages) {}

  // Starts the copies of the next slices into all free slots.
  __device__ __forceinline__ void load() {
#pragma unroll 1
    for (; free_ > 0; free_--) {
      loader_.load_next(ptx::shared_address(s_slots_ + load_stage_ * Config::kSlotBytes));
      if (++load_stage_ == stages_) load_stage_ = 0;
    }
  }
  // Until the oldest slice is there; its slot.
  __device__ __forceinline__ unsigned char* wait() const {
    wait_for_all_but(stages_ - 1 - free_);
    __syncthreads();  // all copies are there
    return s_slots_ + stage_ * Config::kSlotBytes;
  }
  // It has been read.
  __device__ __forceinline__ void release() {
    __syncthreads();
    free_++;
    if (++stage_ == stages_) stage_ = 0;
  }

 private:
  unsigned char* s_slots_;
  ChunkLoader<Config>& loader_;
  int stages_, free_, load_stage_ = 0, stage_ = 0;
};

template <class Config>
__device__ __forceinline__ void attend_chunk(const KernelParams& p, ChunkState<Config>& s_state, const Share& share,
                                             Walk& walk, bool has_piece, ChunkRing<Config>& ring) {
  using Rows = WarpRows<Config>;
  const KernelParams& s_p = s_state.params;
  Rows rows(p, s_state.params);
  ring.load();
  ptx::wait_for_previous_kernel();  // it clears the counters
#pragma unroll 1
  for (; has_piece; has_piece = find_next(s_p, share, walk)) {
    load_query<Config>(s_p, walk, s_state.query);
    __syncthreads();  // the queries are there
    rows.begin(walk);
    rows.take_query(ptx::shared_address(s_state.query));
    const int last_slice = (walk.piece.keys.end + Config::kSliceKeys - 1) / Config::kSliceKeys;
#pragma unroll 1
    for (int slice = walk.piece.keys.begin / Config::kSliceKeys; slice < last_slice; slice++) {
      rows.attend(ring.wait(), slice * Config::kSliceKeys);
      ring.release();
      ring.load();
    }
    const Parts parts = find_parts(s_p, share, walk);
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

template <class Config>
__global__ void __launch_bounds__(Config::kWarps* kWarpSize, Config::kMostBlocks)
    flash_attention_kv_cache_chunk_kernel(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(128) unsigned char s_memory[];
  auto& s_state = *reinterpret_cast<ChunkState<Config>*>(s_memory + p.stages * Config::kStageBytes);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const KernelParams& s_p = s_state.params;
  copy_words(p, s_state.params, threadIdx.x, Config::kWarps * kWarpSize);
  __syncthreads();
  Share& share = s_state.shares[warp];
  Walk &walk = s_state.walks[warp], &loading = s_state.loading[warp];
  begin_share(s_p, share, walk);
  const bool has_piece = find_next(s_p, share, walk);
  if (lane == 0) loading = walk;
  __syncwarp();
  ChunkLoader<Config> loader(p, s_p, share, loading, has_piece);
  ChunkRing<Config> ring(p, s_memory, loader);
  attend_chunk<Config>(p, s_state, share, walk, has_piece, ring);
  ptx::wait_for_previous_kernel();
  if (s_p.call.segment_ids) finish_queries_of_none(s_p);
}

}  // namespace selfattn::cuda::kv_cache
