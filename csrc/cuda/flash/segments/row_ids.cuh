// The segment ids of a batch row as a thread block reads them.
#pragma once
#include <cuda_runtime.h>

#include <cassert>
#include <climits>
#include <cstdint>

#include "tables.h"

namespace selfattn::cuda {

// Ids of one side of one batch row, Id being int or int64_t.
template <class Id>
struct IdRow {
  const Id* data;
  int64_t stride;
  int length;

  __device__ static int narrow(Id id) {
    if constexpr (sizeof(Id) > sizeof(int)) assert(id >= INT_MIN && id <= INT_MAX && "segment ids must fit in int32");
    return static_cast<int>(id);
  }
  __device__ int operator[](int token) const { return narrow(data[token * stride]); }
  __device__ bool is_packed() const { return stride == 1 && reinterpret_cast<uintptr_t>(data) % sizeof(int4) == 0; }
};

constexpr int kQuerySide = 0, kKeySide = 1;

// Of both sides. kSideCount: 2 if keys have ids of their own, else 1.
template <class Id, int kSideCount>
struct RowIds {
  static constexpr int kSides = kSideCount;

  const SegmentProblem& p;
  int64_t b;

  __device__ __forceinline__ int length(int side) const { return side == kQuerySide ? p.query_length : p.key_length; }
  __device__ __forceinline__ IdRow<Id> ids(int side) const {
    const bool are_keys = kSides == 2 && side == kKeySide;
    const int64_t stride_batch = are_keys ? p.key_stride_batch : p.query_stride_batch;
    return {static_cast<const Id*>(are_keys ? p.key_ids : p.query_ids) + b * stride_batch,
            are_keys ? p.key_stride_token : p.query_stride_token, length(side)};
  }
};

}  // namespace selfattn::cuda
