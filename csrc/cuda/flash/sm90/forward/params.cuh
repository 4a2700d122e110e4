// The parameters of the forward kernel.
#pragma once
#include "config.h"
#include "flash/tile/capped_softmax.cuh"
#include "flash/tile/tile_order.cuh"

namespace selfattn::cuda::sm90 {

struct ForwardKernelParams {
  CUtensorMap query, key, value, out;  // boxes: query, out 64 rows; key, value box_rows
  AttentionShape shape;
  AttentionWindow window;
  float scale;
  float* lse;          // (batch, num_heads, query_length)
  const float* sinks;  // (num_heads,) or null
  SegmentTables segments;
  int* repair_list;  // (tiles) for RepairList
  int* counters;     // [0]: tiles taken after each thread block's first; null where there are no others
  TileSchedule schedule;
  SoftcapExponent softcap;  // read by kernels with kHasSoftcap
  KeyPages pages;           // read by kernels with kReadsPages
  int box_rows;             // of `key` and `value`: a key block, or with pages a part of it that is of one page

  // What the softmax's max_score is multiplied by for its logit.
  template <class Config>
  __device__ __forceinline__ float logit_scale() const {
    return Config::kHasSoftcap ? softcap.cap : scale;
  }
};

}  // namespace selfattn::cuda::sm90
