// The parameters of the forward kernel.
#pragma once
#include "config.h"
#include "flash/tile/capped_softmax.cuh"
#include "flash/tile/tile_order.cuh"

namespace selfattn::cuda::sm90 {

struct ForwardKernelParams {
  CUtensorMap query, key, value, out;  // boxes: query, out 64 rows; key, value a key block, or box_rows of a page
  AttentionShape shape;
  AttentionWindow window;
  float scale;
  float* lse;          // (batch, num_heads, query_length)
  const float* sinks;  // (num_heads,) or null
  SegmentTables segments;
  KeyPages pages;    // read by kernels with kReadsPages
  int box_rows;      // with pages: keys of one page that are copied at once; a key block is a whole number of them
  int* repair_list;  // (tiles) for RepairList
  int* counters;     // [0]: tiles taken after each thread block's first; null where there are no others
  TileSchedule schedule;
  SoftcapExponent softcap;  // read by kernels with kHasSoftcap

  // What the softmax's max_score is multiplied by for its logit.
  template <class Config>
  __device__ __forceinline__ float logit_scale() const {
    return Config::kHasSoftcap ? softcap.cap : scale;
  }
};

}  // namespace selfattn::cuda::sm90
