#include "flash/kv_cache/launch.cuh"

namespace selfattn::cuda::kv_cache {

template struct Launcher<ElementType::kHalf, 64, TileKind::kDecode>;
template struct Launcher<ElementType::kHalf, 64, TileKind::kChunk>;

}  // namespace selfattn::cuda::kv_cache
