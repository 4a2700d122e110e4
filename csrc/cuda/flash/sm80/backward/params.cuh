// What the backward kernels are told.
#pragma once
#include "flash/tile/softcap.cuh"
#include "flash/tile/tile_order.cuh"

namespace selfattn::cuda::sm80 {

struct BackwardKernelParams {
  BackwardParams call;
  TileSchedule of_queries, of_keys;  // of the kernel for dQ, by query heads; of that for dK and dV, by key heads
  // (batch, num_heads, stat_pitch) the statistics of the rows (row_stats.cuh), in the workspace; rows past the end up
  // to the pitch, a multiple of kStatRows, have some as well.
  float *lse_log2, *delta;
  int stat_pitch;
  // The single pass: batches first_batch .. of a launch, and the sums of their dQ (dq_accumulator.cuh), query_blocks
  // tiles a head.
  float* dq_sums;
  int query_blocks, first_batch;
  int group_size;   // query heads of a key head
  Softcap softcap;  // read by kernels with kHasSoftcap

  // What a score is multiplied by for its logit: scores of kernels with softcap are a tanh (softcap.cuh).
  template <class Config>
  __device__ __forceinline__ float logit_scale() const {
    return Config::kHasSoftcap ? softcap.cap : call.scale;
  }
};

}  // namespace selfattn::cuda::sm80
