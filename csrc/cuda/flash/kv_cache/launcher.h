// One instantiation of the kernel, as the dispatcher calls it.
#pragma once
#include "params.h"

namespace selfattn::cuda::kv_cache {

// By the rows of a call, that is queries times heads that share a kv head: kFew for up to kFewRows, kDecode for up to
// kDecodeRows, kChunk for more.
enum class TileKind { kFew, kDecode, kChunk };
constexpr int kFewRows = 8, kDecodeRows = 16;

template <ElementType kElement, int kDim, TileKind kKind>
struct Launcher {
  static cudaError_t launch(const KvCacheParams& params, const WorkspaceAllocator& allocate, cudaStream_t stream);
};

}  // namespace selfattn::cuda::kv_cache
