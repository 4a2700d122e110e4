// One instantiation of the kernel, as the dispatcher calls it.
#pragma once
#include "params.h"

namespace selfattn::cuda::kv_cache {

// Rows of a call's tiles: kDecode for up to kDecodeRows queries and heads that share a kv head, kChunk for more.
enum class TileKind { kDecode, kChunk };
constexpr int kDecodeRows = 16;

template <ElementType kElement, int kDim, TileKind kKind>
struct Launcher {
  static int64_t workspace_bytes(const KvCacheParams& params);
  static cudaError_t launch(const KvCacheParams& params, cudaStream_t stream);
};

}  // namespace selfattn::cuda::kv_cache
