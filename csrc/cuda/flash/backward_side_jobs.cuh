// Work on query rows that otherwise idle warps of the main kernel do while tiles are multiplied: the rows of section s
// + 1 are prepared, and those of section s - 1 finished, in the shadow of section s (backward_rows.cuh says what that
// means; section 0 is prepared and the last one finished by the kernels there). One warp claims jobs and brings their
// input in by bulk copy, into two buffers in turn; two warps work. A job is 64 rows of one 64-column patch of dQ to
// finish, or as many bytes of out and dO to prepare.
//
// Jobs are claimed in one fixed order in which none waits for a later one: finishing a section waits for its tiles,
// these wait for its prepared rows, and those come earlier in the order and wait for nothing.
#pragma once
#include "../ptx/fence.cuh"
#include "../ptx/grid.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ptx/tma.cuh"
#include "backward_rows.cuh"
#include "backward_stream.cuh"

namespace selfattn::cuda {

template <class Config>
struct SideJobs {
  static constexpr int kBuffers = Config::kSideBuffers, kBufferBytes = Config::kSideBytes,
                       kWorkers = Config::kSideWorkers;
  static constexpr int kRows = Config::kSideRows;  // of a job that prepares
  const BackwardMaps& maps;
  const BackwardParams& p;
  const BackwardPlan& plan;
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
      const SideJob job = next_job();
      retire(ring.stage, ring.parity ^ 1);
      if (job.head >= 0 && !job.prepares && job.section != finished_section) {
        // Nothing that others wait for may stay unreported while this waits.
        const int other = ring.stage ^ 1;
        retire(other, other < ring.stage ? ring.parity : ring.parity ^ 1);
        ptx::wait_for_count(plan.tiles_done(job.section),
                            plan.pairs_in(job.section) * plan.key_tiles * Config::kConsumerWarps);
        ptx::fence_proxy_async_global();
        finished_section = job.section;
      }
      s.side_job[ring.stage] = job;
      if (job.head < 0) break;
      load(job);
    }
    ptx::mbarrier_arrive(ptx::shared_address(&s.side_full[ring.stage]));
    const int other = ring.stage ^ 1;
    retire(other, other < ring.stage ? ring.parity : ring.parity ^ 1);
  }

  __device__ __forceinline__ int claim() const { return atomicAdd(plan.next_side_job(), 1); }

  // Waits until the buffer is free and reports what was prepared from it.
  __device__ __forceinline__ void retire(int buffer, uint32_t parity) {
    ptx::mbarrier_wait(ptx::shared_address(&s.side_free[buffer]), parity);
    SideJob& job = s.side_job[buffer];
    if (job.head >= 0 && job.prepares) ptx::add_release(plan.rows_prepared(job.section), 1);
    job.head = -1;
  }

  // The job of the claimed number, or of the first number after it that has one; claims the next.
  __device__ __forceinline__ SideJob next_job() {
    const int jobs_of_section = plan.heads_in(0) * plan.patch_rows * Config::kPanels;
    for (;; claimed = claim()) {
      const int during = claimed / (2 * jobs_of_section), rest = claimed % (2 * jobs_of_section);
      if (during >= plan.sections) return {-1, 0, 0, 0, false};
      const bool prepares = rest < jobs_of_section;
      const int section = prepares ? during + 1 : during - 1, index = prepares ? rest : rest - jobs_of_section;
      const int patch_row = index / Config::kPanels, head_of_section = patch_row / plan.patch_rows;
      if (section < 0 || section >= plan.sections || head_of_section >= plan.heads_in(section)) continue;
      claimed = claim();
      return {plan.first_head_of(section) + head_of_section, patch_row % plan.patch_rows, index % Config::kPanels,
              section, prepares};
    }
  }

  __device__ __forceinline__ float* patch_of(const SideJob& job) const {
    return plan.grad_q_sum +
           ((int64_t(job.head) * plan.patch_rows + job.patch_row) * Config::kPanels + job.part) * kPatchFloats;
  }

  __device__ __forceinline__ int first_row_of(const SideJob& job) const {
    return job.patch_row * kPatchRows + job.part * kRows;
  }

  __device__ __forceinline__ void load(const SideJob& job) const {
    using namespace ptx;
    const uint32_t full = shared_address(&s.side_full[ring.stage]), s_buffer = shared_address(s.side[ring.stage]);
    mbarrier_arrive_expect(full, kBufferBytes);
    if (!job.prepares) return bulk_load(full, s_buffer, patch_of(job), kBufferBytes);
    const int batch = job.head / p.shape.num_heads, head = job.head % p.shape.num_heads;
#pragma unroll 1
    for (int panel = 0; panel < Config::kPanels; panel++) {
      const uint32_t s_panel = s_buffer + panel * (kRows * 128);
      tma_load_4d(&maps.side_out, full, s_panel, panel * kPanelColumns, first_row_of(job), head, batch);
      tma_load_4d(&maps.side_grad_out, full, s_panel + kBufferBytes / 2, panel * kPanelColumns, first_row_of(job), head,
                  batch);
    }
  }

  // ---- the warps that work

  __device__ __forceinline__ void run_worker(int worker) {
    for (;; ring.advance()) {
      ptx::mbarrier_wait(ptx::shared_address(&s.side_full[ring.stage]), ring.parity);
      const SideJob job = s.side_job[ring.stage];
      if (job.head < 0) break;
      if (job.prepares)
        prepare(job, worker);
      else
        finish(job, worker);
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(ptx::shared_address(&s.side_free[ring.stage]));
    }
  }

  // Sums by eight lanes a row, then one lane a row.
  __device__ __forceinline__ void prepare(const SideJob& job, int worker) {
    constexpr int kLanes = 8, kRowsAtOnce = 32 / kLanes, kWorkerRows = kRows / kWorkers;
    static_assert(kWorkerRows <= 32);
    const int first = worker * kWorkerRows, row_of_lane = first_row_of(job) + first + lane;
    float lse = -INFINITY;
    if (lane < kWorkerRows && row_of_lane < p.shape.query_length)
      lse = __ldg(p.lse + int64_t(job.head) * p.shape.query_length + row_of_lane);
    float4* g_sum = reinterpret_cast<float4*>(patch_of(job));
#pragma unroll 4
    for (int i = worker * 32 + lane; i < kPatchFloats / 4; i += kWorkers * 32) g_sum[i] = float4{};
#pragma unroll 2
    for (int base = first; base < first + kWorkerRows; base += kRowsAtOnce) {
      const int row = base + lane / kLanes;
      const unsigned char* s_chunk = s.side[ring.stage] + row * 128 + ((lane % kLanes) ^ (row % 8)) * 16;
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
      if (lane % kLanes == 0) s.side_sums[row] = sum, s.side_bits[row] = bits;
    }
    __syncwarp();
    if (lane < kWorkerRows) {
      const auto is_query_bad = [&] {
        return s.side_bits[first + lane] == 0 && !is_query_finite<typename Config::Element>(p, job.head, row_of_lane);
      };
      store_row_stats(plan, job.head, row_of_lane,
                      row_stats(p, job.head, row_of_lane, lse, s.side_sums[first + lane], is_query_bad));
    }
    __syncwarp();
  }

  __device__ __forceinline__ void finish(const SideJob& job, int worker) {
    constexpr int kGroups = kPatchRows / 8;
#pragma unroll 1
    for (int quarter = worker; quarter < kPatchWarps; quarter += kWorkers) {
      FinishedRows<Config> rows(p, job.head, job.patch_row * kPatchRows, job.part * kPanelColumns + quarter * 16);
      const float4* s_sum = reinterpret_cast<const float4*>(s.side[ring.stage]) + quarter * (kGroups * 32) + lane;
#pragma unroll 2
      for (int i = 0; i < kGroups; i++) rows.write_group(s_sum[i * 32]);
    }
  }
};

}  // namespace selfattn::cuda
