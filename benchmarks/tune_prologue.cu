// Times the prologue's kernels over their static choices (heads in flight, blocks a multiprocessor) beside a device
// copy.
//
//     nvcc -std=c++20 -O3 -arch=sm_90a -I csrc/cuda benchmarks/tune_prologue.cu -o tune_prologue && ./tune_prologue
//
// bfloat16, norm and rotation from positions, 16,384 tokens of 2048 features for q and as many for k; three sets of
// tensors in turn. The kernel that adds up the weights' gradients is left out. A line a choice: the median of five
// measurements, each with copies timed before and after it.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "prologue/backward.cuh"
#include "prologue/forward.cuh"

using namespace selfattn::cuda;

namespace {

constexpr int kSets = 3, kTokens = 16384, kHidden = 2048, kCalls = 30, kRounds = 5;
constexpr int64_t kElements = int64_t(kTokens) * kHidden;

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::printf("%s\n", cudaGetErrorString(status));
  std::exit(1);
}

struct Buffers {
  __nv_bfloat16 *input[2], *grad[2], *result[2];
};

Buffers sets[kSets];
float *weight, *sums;
int processors;

__global__ void fill(__nv_bfloat16* data, int64_t count, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    uint32_t x = uint32_t(i) * 2654435761u ^ seed;
    x ^= x >> 15, x *= 2246822519u, x ^= x >> 13;
    data[i] = __float2bfloat16(float(x) * 4.6566e-10f - 1.0f);
  }
}

__global__ void fill_with_ones(float* data, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) data[i] = 1.0f;
}

PrologueParams make_params(const Buffers& b, int dim, int blocks_of_processor) {
  PrologueParams p{};
  p.num_sides = 2, p.dim = dim, p.element = FloatType::kBFloat16;
  p.has_norm = p.has_rope = true, p.eps = 1e-6f, p.theta = 10000.0;
  for (int i = 0; i < dim / 2; i++) p.quarter_turns[i] = std::pow(p.theta, -2.0 * i / dim) * 0.63661977236758134;
  const int slots = processors * blocks_of_processor * kPrologueWarps;
  p.tokens_per_warp = (2 * kTokens + slots - 1) / slots;
  for (int i = 0; i < 2; i++) {
    PrologueSide& side = p.sides[i];
    side.batch = 2, side.length = kTokens / 2, side.heads = kHidden / dim;
    side.input = {b.input[i], int64_t(side.length) * kHidden, kHidden, dim};
    side.grad = {b.grad[i], int64_t(side.length) * kHidden, kHidden, dim};
    side.result = b.result[i];
    side.weight = weight, side.weight_type = FloatType::kFloat;
    const int tokens_of_block = kPrologueWarps * p.tokens_per_warp;
    side.blocks = (kTokens + tokens_of_block - 1) / tokens_of_block;
    side.partial_sums = sums + i * int64_t(side.blocks) * dim;
  }
  return p;
}

template <class Call>
float microseconds(const Call& call) {
  static cudaEvent_t start = nullptr, end = nullptr;
  if (!start) check(cudaEventCreate(&start)), check(cudaEventCreate(&end));
  for (int i = 0; i < kSets; i++) call(sets[i]);
  check(cudaEventRecord(start));
  for (int i = 0; i < kCalls; i++) call(sets[i % kSets]);
  check(cudaEventRecord(end));
  check(cudaEventSynchronize(end));
  check(cudaGetLastError());
  float ms = 0.0f;
  check(cudaEventElapsedTime(&ms, start, end));
  return ms * 1e3f / kCalls;
}

// Of 2 * 2 * kElements elements in and out.
float copy_microseconds() {
  return microseconds([](const Buffers& b) {
    for (int i = 0; i < 2; i++) {
      check(cudaMemcpyAsync(b.result[i], b.input[i], kElements * sizeof(__nv_bfloat16), cudaMemcpyDeviceToDevice));
    }
  });
}

template <class Config>
void time_choice(bool is_backward, int dim, int blocks_of_processor) {
  std::vector<float> times, ratios;
  const double bytes = (is_backward ? 6.0 : 4.0) * kElements * sizeof(__nv_bfloat16);
  const double copied = 4.0 * kElements * sizeof(__nv_bfloat16);
  int blocks = 0;
  for (int round = 0; round < kRounds; round++) {
    const float before = copy_microseconds();
    const float us = microseconds([&](const Buffers& b) {
      const PrologueParams p = make_params(b, dim, blocks_of_processor);
      blocks = p.sides[0].blocks + p.sides[1].blocks;
      if (is_backward) {
        qk_norm_rope_backward_kernel<Config><<<blocks, kPrologueThreads>>>(p);
      } else {
        qk_norm_rope_forward_kernel<Config><<<blocks, kPrologueThreads>>>(p);
      }
    });
    const float copy = (before + copy_microseconds()) / 2;
    times.push_back(us);
    ratios.push_back(float(bytes / us / (copied / copy)));
  }
  std::sort(times.begin(), times.end());
  std::sort(ratios.begin(), ratios.end());
  std::printf(
      "%s D%d heads in flight %2d, at least %d blocks resident, %2d a multiprocessor (%4d): %6.1f us %6.0f GB/s ratio "
      "%.3f\n",
      is_backward ? "backward" : "forward ", dim,
      Config::kRows * (is_backward ? Config::kBackwardPasses : Config::kForwardPasses), Config::kMinBlocks,
      blocks_of_processor, blocks, times[kRounds / 2], bytes / times[kRounds / 2] / 1e3, ratios[kRounds / 2]);
  std::fflush(stdout);
}

template <int kLanes, int kPasses, int kMinBlocks_>
struct Choice : PrologueConfig<__nv_bfloat16, kLanes, false> {
  static constexpr int kForwardPasses = kPasses, kBackwardPasses = kPasses, kMinBlocks = kMinBlocks_;
};

template <int kLanes, int kPasses, int kMinBlocks>
void time_grids(bool is_backward) {
  for (const int blocks : {2, 4, 8, 16, 32}) {
    time_choice<Choice<kLanes, kPasses, kMinBlocks>>(is_backward, kLanes * kLaneElements, blocks);
  }
}

template <int kLanes>
void time_all() {
  time_grids<kLanes, 1, 4>(false);
  time_grids<kLanes, 2, 2>(false);
  time_grids<kLanes, 2, 3>(false);
  time_grids<kLanes, 4, 2>(false);
  time_grids<kLanes, 4, 3>(false);
  time_grids<kLanes, 1, 2>(true);
  time_grids<kLanes, 1, 3>(true);
  time_grids<kLanes, 2, 2>(true);
}

}  // namespace

int main() {
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0));
  check(cudaMalloc(&weight, kMaxVectorDim * sizeof(float)));
  fill_with_ones<<<1, 256>>>(weight, kMaxVectorDim);
  check(cudaMalloc(&sums, int64_t(kTokens) * kMaxVectorDim * sizeof(float)));
  uint32_t seed = 1;
  for (Buffers& b : sets) {
    for (int i = 0; i < 2; i++) {
      for (__nv_bfloat16** data : {&b.input[i], &b.grad[i], &b.result[i]}) {
        check(cudaMalloc(data, kElements * sizeof(__nv_bfloat16)));
        fill<<<1024, 256>>>(*data, kElements, seed++);
      }
    }
  }
  check(cudaDeviceSynchronize());
  std::printf("copy %.1f us\n", copy_microseconds());
  time_all<8>();
  time_all<4>();
}
