// In one file: compressed together they take half the room.
#include "flash/kv_cache/launch.cuh"

namespace selfattn::cuda::kv_cache {

template struct Launcher<ElementType::kHalf, 64, TileKind::kFew>;
template struct Launcher<ElementType::kHalf, 64, TileKind::kDecode>;
template struct Launcher<ElementType::kHalf, 64, TileKind::kChunk>;
template struct Launcher<ElementType::kHalf, 128, TileKind::kFew>;
template struct Launcher<ElementType::kHalf, 128, TileKind::kDecode>;
template struct Launcher<ElementType::kHalf, 128, TileKind::kChunk>;
template struct Launcher<ElementType::kHalf, 256, TileKind::kFew>;
template struct Launcher<ElementType::kHalf, 256, TileKind::kDecode>;
template struct Launcher<ElementType::kHalf, 256, TileKind::kChunk>;

}  // namespace selfattn::cuda::kv_cache
