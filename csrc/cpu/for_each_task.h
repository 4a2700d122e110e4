#pragma once

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <atomic>

namespace selfattn::cpu {

/// run(task, workspace) for each task, on all threads; a thread takes the next task when it is done with one, and calls
/// finish() at its end.
template <typename Run, typename Finish>
void for_each_task(int64_t tasks, int64_t workspace_bytes, const Run& run, const Finish& finish) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(at::get_num_threads(), tasks);
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    const at::DataPtr workspace = c10::GetCPUAllocator()->allocate(workspace_bytes);
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) run(task, workspace.get());
    finish();
  });
}

}  // namespace selfattn::cpu
