// The deterministic mode adds to the dQ of a query tile in a fixed order of the key tiles
// (BackwardSchedule::walks_upward). A semaphore for each query tile counts the key tiles that have added to it. Two
// warps of the producer warpgroup keep it, so that no consumer polls or fences: one waits until all key tiles ahead of
// this one have added to a block's query tile, the other counts this one when its additions are performed. Both follow
// the blocks as the consumer warps do.
#pragma once
#include "flash/sm90/backward/config.cuh"
#include "flash/sm90/backward/intervals.cuh"
#include "ptx/grid.cuh"
#include "ptx/mbarrier.cuh"

namespace selfattn::cuda::sm90 {

template <class Config>
struct DqSemaphore {
  static constexpr int kWarps = 2;
  static constexpr unsigned kAllLanes = ~0u;
  const BackwardParams& p;
  const BackwardSchedule& schedule;
  typename Config::SharedStorage& s;
  int lane = threadIdx.x % 32;
  // Of the key tile at work.
  int key_tile = 0, batch = 0;
  RowSegments segments = {};
  int counted_tile = 0,
      adds_ahead = 0;  // tiles ahead of it up to (not including) counted_tile, and how many of them meet queries

  // How many key tiles add to query tile `tile` before this one: those that lie ahead of it in the order and meet the
  // tile.
  __device__ __forceinline__ int adds_before(int tile) {
    const int step = schedule.walks_upward ? 1 : -1;
    if (segments.has_ids) return adds_before_by_segments(tile, step);
    // All up to the last one that reaches the tile by intervals. The producer comes to ever farther ones, so the count
    // goes on.
    for (; 0 <= counted_tile && counted_tile < schedule.key_tiles; counted_tile += step) {
      const Interval tiles = query_tiles_of<Config>(p, batch, segments.has_runs, counted_tile);
      if (tiles.begin >= tiles.end) continue;
      if (schedule.walks_upward ? tiles.begin > tile : tiles.end <= tile) break;
      adds_ahead++;
    }
    return adds_ahead;
  }

  __device__ __forceinline__ int adds_before_by_segments(int tile, int step) const {
    int adds = 0;
    const SegmentBlock queries = query_block<Config::kTileQ>(p, schedule, batch, tile);
    const int tiles_ahead = schedule.walks_upward ? schedule.key_tiles - 1 - key_tile : key_tile;
    for (int base = 0; base < tiles_ahead; base += 32) {
      bool meets = base + lane < tiles_ahead;
      if (meets) {
        const int other = key_tile + step * (base + lane + 1);
        const Interval tiles = query_tiles_of<Config>(p, batch, segments.has_runs, other);
        meets = tiles.begin <= tile && tile < tiles.end &&
                may_share_segment(queries, p.segments.key_blocks[int64_t(batch) * schedule.key_tiles + other]);
      }
      adds += __popc(__ballot_sync(kAllLanes, meets));
    }
    return adds;
  }

  __device__ __forceinline__ void run(bool waits) {
    Ring<Config::kStages> ring;
    uint32_t tile_parity = 0;
    bool is_new_tile = true;
    for (;; ring.advance()) {
      ptx::mbarrier_wait(s.q_full[ring.stage], ring.parity);
      const BlockInfo block = s.block[ring.stage];
      if (block.flags & kEndOfBlocks) break;
      int* semaphore = schedule.dq_semaphores + block.dq_tile_row / Config::kDqTileRowsPerTile;
      if (waits) {
        if (is_new_tile) {
          ptx::mbarrier_wait(s.k_full[0], tile_parity);
          tile_parity ^= 1;
          key_tile = s.tile[0].key_tile, batch = s.tile[0].batch;
          segments = segments_of_row(p.segments, batch);
          counted_tile = key_tile + (schedule.walks_upward ? 1 : -1), adds_ahead = 0;
        }
        is_new_tile = block.flags & kLastOfTile;
        arrive_by_warp(s.q_empty[ring.stage], lane);
        if (block.dq_tile_row >= 0) {
          const int adds_ahead = adds_before(block.query_tile);
          while (ptx::load_relaxed(semaphore) != adds_ahead) {
          }
          ptx::fence_gpu();
        }
        arrive_by_warp(s.may_add[ring.stage], lane);
      } else {
        ptx::mbarrier_wait(s.added[ring.stage], ring.parity);
        __syncwarp();
        if (lane == 0) {
          ptx::mbarrier_arrive(s.q_empty[ring.stage]);
          if (block.dq_tile_row >= 0) ptx::add_release(semaphore, 1);
        }
        __syncwarp();
      }
    }
  }
};

}  // namespace selfattn::cuda::sm90
