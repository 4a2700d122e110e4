// Chooses the kernel for a call: the smallest head dimension that holds the call's. Loads fill the rest with zeros.
#include <algorithm>

#include "launcher.h"

namespace selfattn::cuda {
namespace {

using kv_cache::Launcher;
using kv_cache::TileKind;

struct Kernel {
  int dim;
  cudaError_t (*launch)(const KvCacheParams&, const WorkspaceAllocator&, cudaStream_t);
};

template <ElementType kElement, int kDim, TileKind kKind>
constexpr Kernel kernel_for() {
  return {kDim, Launcher<kElement, kDim, kKind>::launch};
}

// Each is instantiated in instantiations/.
template <ElementType kElement, TileKind kKind>
constexpr Kernel kKernels[] = {kernel_for<kElement, 64, kKind>(), kernel_for<kElement, 128, kKind>(),
                               kernel_for<kElement, 256, kKind>()};

// With ids, how many queries a row has is known on the device alone. The kind must not depend on the other rows where
// split_keys is given.
TileKind kind_of(const KvCacheParams& params) {
  int64_t queries = params.queries;  // of a row
  if (params.segment_ids) {
    const bool is_one = params.split_keys || params.has_short_rows;
    queries = is_one ? 1 : int64_t(params.batch) * params.queries / params.rows;
  }
  const int64_t rows = queries * params.group();
  if (rows <= kv_cache::kFewRows) return TileKind::kFew;
  return rows <= kv_cache::kDecodeRows ? TileKind::kDecode : TileKind::kChunk;
}

template <ElementType kElement>
const Kernel& find_kernel(const KvCacheParams& params) {
  const TileKind kind = kind_of(params);
  const auto& kernels = kind == TileKind::kFew      ? kKernels<kElement, TileKind::kFew>
                        : kind == TileKind::kDecode ? kKernels<kElement, TileKind::kDecode>
                                                    : kKernels<kElement, TileKind::kChunk>;
  return *std::find_if(std::begin(kernels), std::end(kernels) - 1,
                       [&](const Kernel& kernel) { return params.dim_qk <= kernel.dim && params.dim_v <= kernel.dim; });
}

const Kernel& find_kernel(const KvCacheParams& params) {
  return params.element == ElementType::kBFloat16 ? find_kernel<ElementType::kBFloat16>(params)
                                                  : find_kernel<ElementType::kHalf>(params);
}

}  // namespace

cudaError_t launch_attend_kv_cache(const KvCacheParams& params, const WorkspaceAllocator& allocate,
                                   cudaStream_t stream) {
  return find_kernel(params).launch(params, allocate, stream);
}

}  // namespace selfattn::cuda
