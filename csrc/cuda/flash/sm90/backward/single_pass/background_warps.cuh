// Work on query rows that otherwise idle warps of the main kernel do while tiles are multiplied: the rows of section s
// + 1 are preprocessed, and those of section s - 1 postprocessed, in the shadow of section s (preprocess.cuh and
// postprocess.cuh say what that means; section 0 is preprocessed and the last one postprocessed by the kernels there).
// One warp claims jobs and brings their input in by bulk copy, into two buffers alternately; two warps work. A job is
// 64 rows of one 64-column tile of dQ to postprocess, or as many bytes of out and dO to preprocess.
//
// Jobs are claimed in one fixed order in which none waits for a later one: postprocessing a section waits for its
// tiles, these wait for its preprocessed rows, and those come earlier in the order and wait for nothing.
#pragma once
#include "flash/sm90/backward/query_producer.cuh"
#include "flash/sm90/backward/row_stats.cuh"
#include "postprocess.cuh"
#include "ptx/fence.cuh"
#include "ptx/grid.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"

namespace selfattn::cuda::sm90 {

template <class Config>
struct BackgroundWarps {
  static constexpr int kBuffers = Config::kBackgroundBuffers, kBufferBytes = Config::kBackgroundBytes,
                       kWorkers = Config::kBackgroundWorkers;
  static constexpr int kRows = Config::kBackgroundRows;  // of a job that preprocesses
  const BackwardMaps& maps;
  const BackwardParams& p;
  const BackwardSchedule& schedule;
  typename Config::SharedStorage& s;
  int lane = threadIdx.x % 32;

  // ---- the warp that loads; one lane of it

  int claimed = 0;
  int finished_section = -1;  // known to be through with its tiles
  Ring<kBuffers> ring = {};

  __device__ __forceinline__ void run_loader() {
    if (lane != 0) return;
    claimed = claim();
    for (;; ring.advance()) {
      const BackgroundJob job = next_job();
      retire(ring.stage, ring.parity ^ 1);
      if (job.head >= 0 && !job.preprocesses && job.section != finished_section) {
        // Nothing that others wait for may stay unreported while this waits.
        const int other = ring.stage ^ 1;
        retire(other, other < ring.stage ? ring.parity : ring.parity ^ 1);
        ptx::wait_for_count(schedule.tiles_done(job.section),
                            schedule.kv_groups_in(job.section) * schedule.key_tiles * Config::kConsumerWarps);
        ptx::fence_proxy_async_global();
        finished_section = job.section;
      }
      s.background_job[ring.stage] = job;
      if (job.head < 0) break;
      load(job);
    }
    ptx::mbarrier_arrive(s.background_full[ring.stage]);
    const int other = ring.stage ^ 1;
    retire(other, other < ring.stage ? ring.parity : ring.parity ^ 1);
  }

  __device__ __forceinline__ int claim() const { return atomicAdd(schedule.next_background_job(), 1); }

  // Waits until the buffer is free and reports what was preprocessed from it.
  __device__ __forceinline__ void retire(int buffer, uint32_t parity) {
    ptx::mbarrier_wait(s.background_empty[buffer], parity);
    BackgroundJob& job = s.background_job[buffer];
    if (job.head >= 0 && job.preprocesses) ptx::add_release(schedule.rows_preprocessed(job.section), 1);
    job.head = -1;
  }

  // The job of the claimed number, or of the first number after it that has one; claims the next.
  __device__ __forceinline__ BackgroundJob next_job() {
    const int jobs_of_section = schedule.heads_in(0) * schedule.dq_tile_rows * Config::kPanels;
    for (;; claimed = claim()) {
      const int during = claimed / (2 * jobs_of_section), rest = claimed % (2 * jobs_of_section);
      if (during >= schedule.sections) return {-1, 0, 0, 0, false};
      const bool preprocesses = rest < jobs_of_section;
      const int section = preprocesses ? during + 1 : during - 1, index = preprocesses ? rest : rest - jobs_of_section;
      const int dq_tile_row = index / Config::kPanels, head_of_section = dq_tile_row / schedule.dq_tile_rows;
      if (section < 0 || section >= schedule.sections || head_of_section >= schedule.heads_in(section)) continue;
      claimed = claim();
      return {schedule.first_head_of(section) + head_of_section, dq_tile_row % schedule.dq_tile_rows,
              index % Config::kPanels, section, preprocesses};
    }
  }

  __device__ __forceinline__ float* dq_tile_of(const BackgroundJob& job) const {
    return schedule.dq_accumulator +
           ((int64_t(job.head) * schedule.dq_tile_rows + job.dq_tile_row) * Config::kPanels + job.part) * kDqTileFloats;
  }

  __device__ __forceinline__ int first_row_of(const BackgroundJob& job) const {
    return job.dq_tile_row * kDqTileRows + job.part * kRows;
  }

  __device__ __forceinline__ void load(const BackgroundJob& job) const {
    using namespace ptx;
    uint64_t& full = s.background_full[ring.stage];
    const uint32_t s_buffer = shared_address(s.background[ring.stage]);
    mbarrier_arrive_expect(full, kBufferBytes);
    if (!job.preprocesses) return bulk_load(full, s_buffer, dq_tile_of(job), kBufferBytes);
    const int batch = job.head / p.shape.num_heads, head = job.head % p.shape.num_heads;
#pragma unroll 1
    for (int panel = 0; panel < Config::kPanels; panel++) {
      const uint32_t s_panel = s_buffer + panel * (kRows * 128);
      tma_load_4d(&maps.background_out, full, s_panel, panel * kPanelColumns, first_row_of(job), head, batch);
      tma_load_4d(&maps.background_grad_out, full, s_panel + kBufferBytes / 2, panel * kPanelColumns, first_row_of(job),
                  head, batch);
    }
  }

  // ---- the warps that work

  __device__ __forceinline__ void run_worker(int worker) {
    for (;; ring.advance()) {
      ptx::mbarrier_wait(s.background_full[ring.stage], ring.parity);
      const BackgroundJob job = s.background_job[ring.stage];
      if (job.head < 0) break;
      if (job.preprocesses)
        preprocess(job, worker);
      else
        postprocess(job, worker);
      arrive_by_warp(s.background_empty[ring.stage], lane);
    }
  }

  // Sums by eight lanes a row, then one lane a row.
  __device__ __forceinline__ void preprocess(const BackgroundJob& job, int worker) {
    constexpr int kLanes = 8, kRowsAtOnce = 32 / kLanes, kWorkerRows = kRows / kWorkers;
    static_assert(kWorkerRows <= 32);
    const int first = worker * kWorkerRows, row_of_lane = first_row_of(job) + first + lane;
    float lse = -INFINITY;
    if (lane < kWorkerRows && row_of_lane < p.shape.query_length)
      lse = __ldg(p.lse + int64_t(job.head) * p.shape.query_length + row_of_lane);
    float4* g_sum = reinterpret_cast<float4*>(dq_tile_of(job));
#pragma unroll 4
    for (int i = worker * 32 + lane; i < kDqTileFloats / 4; i += kWorkers * 32) g_sum[i] = float4{};
#pragma unroll 2
    for (int base = first; base < first + kWorkerRows; base += kRowsAtOnce) {
      const int row = base + lane / kLanes;
      const unsigned char* s_chunk = s.background[ring.stage] + row * 128 + ((lane % kLanes) ^ (row % 8)) * 16;
      float sum = 0.f;
      unsigned bits = 0;
#pragma unroll
      for (int panel = 0; panel < Config::kPanels; panel++) {
        const uint4 out = *reinterpret_cast<const uint4*>(s_chunk + panel * (kRows * 128));
        sum += dot<typename Config::Element>(
            out, *reinterpret_cast<const uint4*>(s_chunk + panel * (kRows * 128) + kBufferBytes / 2));
        bits |= magnitude_bits(out);
      }
#pragma unroll
      for (int distance = kLanes / 2; distance; distance /= 2) {
        sum += __shfl_xor_sync(~0u, sum, distance);
        bits |= __shfl_xor_sync(~0u, bits, distance);
      }
      if (lane % kLanes == 0) s.background_sums[row] = sum, s.background_bits[row] = bits;
    }
    __syncwarp();
    if (lane < kWorkerRows) {
      const auto is_query_bad = [&] {
        return s.background_bits[first + lane] == 0 &&
               !is_query_finite<typename Config::Element>(p, job.head, row_of_lane);
      };
      store_row_stats(schedule, job.head, row_of_lane,
                      row_stats(p, job.head, row_of_lane, lse, s.background_sums[first + lane], is_query_bad));
    }
    __syncwarp();
  }

  __device__ __forceinline__ void postprocess(const BackgroundJob& job, int worker) {
    constexpr int kGroups = kDqTileRows / 8;
#pragma unroll 1
    for (int slice = worker; slice < kDqTileWarps; slice += kWorkers) {
      DqRows<Config> rows(p, job.head, job.dq_tile_row * kDqTileRows, job.part * kPanelColumns + slice * 16);
      const float4* s_sum = reinterpret_cast<const float4*>(s.background[ring.stage]) + slice * (kGroups * 32) + lane;
#pragma unroll 2
      for (int i = 0; i < kGroups; i++) rows.write_group(s_sum[i * 32]);
    }
  }
};

}  // namespace selfattn::cuda::sm90
