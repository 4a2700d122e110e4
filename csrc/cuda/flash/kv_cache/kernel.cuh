// One kernel reads the whole cache: as many thread blocks as the device holds at once, each with an equal share of the
// keys (schedule.cuh). A share is a row of pieces, a piece some keys of one tile of rows and one kv head.
//
//   each group of warps, on its own:  wait for a slice | S = Q K^T | softmax | O += P V | start the copies of the slice
//                                     that is a ring behind it, of whichever piece
//   at the end of a piece, together:  the groups' O -> shared memory | merge them -> the output, or a partial result
//   at the end of a split head tile:    the thread block that arrives last merges its partial results, in their order
//
// No barrier of the thread block stands between the slices, and while a piece ends, copies of the next ones go on.
//
// A small call takes as long as its code takes to come from cold memory: what is there twice is a function, what few
// calls want stands apart, and loops are unrolled only inside a slice.
#pragma once
#include "loader.cuh"
#include "ptx/barrier.cuh"
#include "ptx/grid.cuh"
#include "ptx/launch.cuh"
#include "results.cuh"
#include "rows.cuh"

namespace selfattn::cuda::kv_cache {

// Until all copies but those of the last `slices` slices are there.
__device__ __forceinline__ void wait_for_all_but(int slices) {
  static_assert(Pipeline::kMostStages == 3);
  if (slices == 3)
    ptx::wait_for_copies<3>();
  else if (slices == 2)
    ptx::wait_for_copies<2>();
  else if (slices == 1)
    ptx::wait_for_copies<1>();
  else
    ptx::wait_for_copies<0>();
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMostBlocks)
    flash_attention_kv_cache_kernel(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(128) unsigned char s_memory[];
  auto& s_state = *reinterpret_cast<typename Config::SharedState*>(s_memory + p.stages * Config::kStageBytes);
  using Rows = WarpRows<Config>;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, group = warp / Config::kRowWarps;
  unsigned char* s_ring = s_memory + group * p.stages * Config::kSlotBytes;
  const auto slot = [&](int stage) { return s_ring + stage * Config::kSlotBytes; };
  const auto sync_group = [&] {
    if constexpr (Config::kRowWarps == 1)
      __syncwarp();
    else
      ptx::barrier_sync(1 + group, Config::kGroupThreads);
  };

  // The first piece is found once, for the copies and for the products.
  Share& share = s_state.shares[warp];
  Walk &loading = s_state.loading[warp], &walk = s_state.attending[warp];
  if (p.schedule.is_prepared) ptx::wait_for_previous_kernel();  // its schedule is there
  const Share found = find_share(p);
  if (Rows::lane() == 0) share = found, loading = begin_walk(found);
  __syncwarp();
  bool has_piece = find_next(p, share, loading);
  if (Rows::lane() == 0) walk = loading;
  __syncwarp();

  Loader<Config> loader(p, share, loading, has_piece);
  Rows rows(p);
  int to_load = p.stages, load_stage = 0, stage = 0;
  int slice = 0, last_slice = 0;  // of the piece, for this group
  bool is_at_begin = true;
  const uint32_t s_query = ptx::shared_address(s_state.query);
#pragma unroll 1
  for (;;) {
    // Queries first: keys that are asked for ahead of them would be waited for with them.
    if (is_at_begin && has_piece) {
      Rows::load_query(p, walk, s_query);
      ptx::commit_copies();
    }
    const int loads = to_load;
#pragma unroll 1
    for (; to_load > 0; to_load--) {
      loader.load_next(ptx::shared_address(slot(load_stage)));
      if (++load_stage == p.stages) load_stage = 0;
    }
    if (is_at_begin) {
      if (!has_piece) break;
      rows.begin(walk);
      wait_for_all_but(loads);
      __syncthreads();  // the queries are there
      rows.take_query(s_query);
      slice = first_slice_of<Config>(walk.piece.keys, group);
      last_slice = (walk.piece.keys.end + Config::kSliceKeys - 1) / Config::kSliceKeys;
      is_at_begin = false;
    }
    unsigned char* s_read = nullptr;  // the slot that is not filled again yet
    if (slice < last_slice) {
      s_read = slot(stage);
      wait_for_all_but(p.stages - 1);
      sync_group();  // all of the group's copies are there
      rows.attend(s_read, slice * Config::kSliceKeys);
      sync_group();  // the slot has been read
      slice += Config::kKeyGroups, to_load = 1;
      if (++stage == p.stages) stage = 0;
    }
    if (slice < last_slice) continue;

    is_at_begin = true;
    const int count = walk.tile.count;
    const bool is_whole = walk.is_whole();
    Parts parts{};
    if (!is_whole) parts = Parts(p, share, walk);
    const auto target = [&](int row, const SplitStats& stats, bool is_first_lane) {
      return is_whole ? RowTarget<Config>(p, walk, row, stats, is_first_lane)
                      : RowTarget<Config>(p, parts.place_of(p, walk.piece), row, stats, is_first_lane);
    };
    if constexpr (Config::kKeyGroups == 1) {
      const SplitStats stats[2] = {rows.stats(0), rows.stats(1)};
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int row = rows.tile_row(r);
        if (row >= count) continue;
        const RowTarget<Config> target_of_row = target(row, stats[r], rows.lane() % 4 == 0);
        rows.give_output([&](int of_row, int column, const float2& out) {
          if (of_row == r) target_of_row.template store<2>(column, {out.x, out.y});
        });
      }
    } else {
      // Each group leaves its results; the columns of a row stand in its slot in groups of 8, swizzled.
      constexpr int kWidth = Config::kDim / kWarpSize;
      const auto place = [](int row, int column) {
        return (row * Config::kDim + row % 8 * 8 + column % 8) ^ (column / 8 * 8);
      };
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const SplitStats stats = rows.stats(r);
        if (rows.lane() % 4 == 0) s_state.stats[group][rows.tile_row(r)] = stats;
      }
      if (s_read) {
        auto* s_out = reinterpret_cast<float*>(s_read);
        rows.give_output([&](int r, int column, const float2& out) {
          if (rows.tile_row(r) < count) *reinterpret_cast<float2*>(s_out + place(rows.tile_row(r), column)) = out;
        });
      }
      if (rows.lane() == 0) s_state.outputs[group] = reinterpret_cast<float*>(s_read);
      __syncthreads();  // all groups' results are there
      const float c = logit_scale(p) * kLog2E;
      const int column = rows.lane() * kWidth;
#pragma unroll 1
      for (int row = warp; row < count; row += Config::kWarps) {
        RowMerge<kWidth> merge;
        float top = -infinity();
#pragma unroll
        for (int g = 0; g < Config::kKeyGroups; g++) top = fmaxf(top, s_state.stats[g][row].x);
        merge.raise(top, c);
#pragma unroll
        for (int g = 0; g < Config::kKeyGroups; g++) {
          if (!s_state.outputs[g]) continue;  // it had no slice
          float out[kWidth];
          load_columns(s_state.outputs[g] + place(row, column), out, [](const auto* s) { return *s; });
          merge.add(s_state.stats[g][row], out, c);
        }
        target(row, {merge.max, merge.sum}, rows.lane() == 0).store(column, merge.out);
      }
    }
    __syncthreads();  // all results of the piece are written; slots and queries are free

    if (!is_whole && walk.piece.ends_part) {
      if (parts.blocks > 1) {
        if (threadIdx.x == 0) {
          ptx::wait_for_previous_kernel();  // it clears the counters
          const int before = ptx::add_acquire_release(p.schedule.counters + parts.first_block, 1);
          s_state.is_last_arriver = before == parts.blocks - 1;
        }
        __syncthreads();
      }
      if (parts.blocks == 1 || s_state.is_last_arriver) merge_parts<Config>(p, parts, walk);
    }
    has_piece = find_next(p, share, walk);
  }
  ptx::wait_for_previous_kernel();
}

}  // namespace selfattn::cuda::kv_cache
