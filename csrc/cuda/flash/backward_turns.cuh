// The deterministic mode adds to the dQ of a query tile in a fixed order of the key tiles (BackwardPlan::walks_upward).
// Two warps of the loading warpgroup keep the turns, so that no multiplying warp polls or fences: one waits until it is
// the key tile's turn at a block's query tile, the other passes the turn on when the block's additions are performed.
// Both follow the stream of blocks as the multiplying warps do.
#pragma once
#include "../ptx/grid.cuh"
#include "../ptx/mbarrier.cuh"
#include "backward_config.cuh"
#include "backward_visible.cuh"

namespace selfattn::cuda {

template <class Config>
struct TurnKeeper {
  static constexpr int kWarps = 2;
  static constexpr unsigned kAllLanes = ~0u;
  const BackwardParams& p;
  const BackwardPlan& plan;
  typename Config::SharedStorage& s;
  int lane = threadIdx.x % 32;
  // Of the key tile at work.
  int key_tile = 0, batch = 0;
  bool is_contiguous = false, is_general = false;
  int counted_tile = 0,
      meetings = 0;  // tiles ahead of it up to (not including) counted_tile, and how many of them meet queries

  // How many key tiles add to query tile `tile` before this one: those that lie ahead of it in the order and meet the
  // tile.
  __device__ __forceinline__ int turn_of(int tile) {
    const int step = plan.walks_upward ? 1 : -1;
    if (is_general) return turn_by_segments(tile, step);
    // All up to the last one that reaches the tile by intervals. The stream comes to ever farther ones, so the count
    // goes on.
    for (; 0 <= counted_tile && counted_tile < plan.key_tiles; counted_tile += step) {
      const int2 tiles = query_tiles_of<Config>(p, batch, is_contiguous, counted_tile);
      if (tiles.x >= tiles.y) continue;
      if (plan.walks_upward ? tiles.x > tile : tiles.y <= tile) break;
      meetings++;
    }
    return meetings;
  }

  __device__ __forceinline__ int turn_by_segments(int tile, int step) const {
    int turn = 0;
    const SegmentBlock queries = query_block<Config::kTileQ>(p, plan, batch, tile);
    const int tiles_ahead = plan.walks_upward ? plan.key_tiles - 1 - key_tile : key_tile;
    for (int base = 0; base < tiles_ahead; base += 32) {
      bool meets = base + lane < tiles_ahead;
      if (meets) {
        const int other = key_tile + step * (base + lane + 1);
        const int2 tiles = query_tiles_of<Config>(p, batch, is_contiguous, other);
        meets = tiles.x <= tile && tile < tiles.y &&
                may_share_segment(queries, p.segments.key_blocks[int64_t(batch) * plan.key_tiles + other]);
      }
      turn += __popc(__ballot_sync(kAllLanes, meets));
    }
    return turn;
  }

  __device__ __forceinline__ void run(bool waits) {
    Ring<Config::kStages> ring;
    uint32_t tile_parity = 0;
    bool is_new_tile = true;
    for (;; ring.advance()) {
      ptx::mbarrier_wait(ptx::shared_address(&s.q_full[ring.stage]), ring.parity);
      const BlockInfo block = s.block[ring.stage];
      if (block.flags & kEndOfStream) break;
      int* turn_counter = plan.turns + block.patch_row / Config::kPatchRowsOfTile;
      if (waits) {
        if (is_new_tile) {
          ptx::mbarrier_wait(ptx::shared_address(&s.k_full), tile_parity);
          tile_parity ^= 1;
          key_tile = s.tile[0].key_tile, batch = s.tile[0].batch;
          const bool has_segments = p.segments.mode != nullptr;
          is_general = has_segments && p.segments.mode[batch] == kGeneral;
          is_contiguous = has_segments && !is_general;
          counted_tile = key_tile + (plan.walks_upward ? 1 : -1), meetings = 0;
        }
        is_new_tile = block.flags & kLastOfTile;
        __syncwarp();  // all lanes have read the block
        if (lane == 0) ptx::mbarrier_arrive(ptx::shared_address(&s.q_free[ring.stage]));
        if (block.patch_row >= 0) {
          const int turn = turn_of(block.query_tile);
          while (ptx::load_relaxed(turn_counter) != turn) {
          }
          ptx::fence_gpu();
        }
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(ptx::shared_address(&s.has_turn[ring.stage]));
      } else {
        ptx::mbarrier_wait(ptx::shared_address(&s.added[ring.stage]), ring.parity);
        __syncwarp();
        if (lane == 0) {
          ptx::mbarrier_arrive(ptx::shared_address(&s.q_free[ring.stage]));
          if (block.patch_row >= 0) ptx::add_release(turn_counter, 1);
        }
        __syncwarp();
      }
    }
  }
};

}  // namespace selfattn::cuda
