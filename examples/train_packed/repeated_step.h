#pragma once

#include <ATen/core/Tensor.h>
#ifdef WITH_CUDA_GRAPHS
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <functional>
#include <memory>
#include <utility>

/// Work of constant shapes on the same tensors, done again and again; on a GPU it is captured as one CUDA graph.
class RepeatedStep {
 public:
  /// `step` is done a few times at once: TorchScript optimises a model in its first runs.
  RepeatedStep(std::function<void()> step, at::Device device) : step_(std::move(step)) {
    for (int run = 0; run < kWarmUpRuns; ++run) step_();
#ifdef WITH_CUDA_GRAPHS
    if (!device.is_cuda()) return;
    graph_ = std::make_unique<at::cuda::CUDAGraph>();
    c10::cuda::getCurrentCUDAStream().synchronize();
    const c10::cuda::CUDAStreamGuard guard(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device.index()));
    graph_->capture_begin();
    step_();
    graph_->capture_end();
#else
    static_cast<void>(device);
#endif
  }

  void operator()() {
#ifdef WITH_CUDA_GRAPHS
    if (graph_) return graph_->replay();
#endif
    step_();
  }

 private:
  static constexpr int kWarmUpRuns = 3;

  std::function<void()> step_;
#ifdef WITH_CUDA_GRAPHS
  std::unique_ptr<at::cuda::CUDAGraph> graph_;
#endif
};
