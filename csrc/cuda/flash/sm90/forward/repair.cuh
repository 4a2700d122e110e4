// Tiles that the fast pass could not get right, computed once more by the same roles with more care.
//
// What the fast pass leaves to the second one:
//   - A masked weight is 0, but the tensor cores multiply it all the same, and 0 times a NaN or an infinity in V is
//   NaN:
//     one such V reaches every query of the tile, in another document, in padding, in the future. Rows that come out
//     non-finite though the sum of their weights is finite show it.
//   - Rows whose logits are so large that max * scale has no digits left for the differences (online_softmax.cuh).
// A consumer that finds such a row marks the tile (repair_list.cuh). The repairing consumers take maxima off the
// scores, clear what is not finite in V before they multiply, and add the products of such elements one by one, for the
// pairs that are allowed. Whatever is finite comes out with the bits that it would have without its neighbours.
#pragma once
#include "flash/sm90/operand_rows.cuh"
#include "flash/tile/online_softmax.cuh"
#include "params.cuh"
#include "ptx/barrier.cuh"
#include "ptx/fence.cuh"

namespace selfattn::cuda::sm90 {

// By the consumers of all warpgroups together, behind a block's P in `weights` (accumulator layout, 0 where a pair is
// masked) and its V in `stage`: adds the products of what is not finite in V to the output of the allowed pairs, and
// clears it for the tensor cores. The output may still wait for its rescaling; that leaves NaN and infinity as they
// are.
template <class Config, int kScores, int kOutputs>
__device__ __forceinline__ void take_out_non_finite_values(typename Config::SharedStorage& s, int stage,
                                                           const float (&weights)[kScores], float (&out)[kOutputs]) {
  using Element = typename Config::Element;
  constexpr int kTileKey = Config::kTileKey;
  const int lane = threadIdx.x % kWarpSize;
  unsigned char* s_value = s.v[stage];
#pragma unroll 1
  for (int key = 0; key < kTileKey; key++) {
    if (is_row_finite<Element, Config::kPanelsV, Config::kKeyPanelBytes>(s_value, key)) continue;
    // The weights of the lane's two rows with this key, from the lane of the four that has them.
    float weight[2] = {};
#pragma unroll
    for (int i = 0; i < kScores; i++)
      if (i / 4 == key / 8 && i % 2 == key % 2) weight[i / 2 % 2] = weights[i];
#pragma unroll
    for (int r = 0; r < 2; r++) weight[r] = __shfl_sync(~0u, weight[r], lane / 4 * 4 + key % 8 / 2);
#pragma unroll
    for (int i = 0; i < kOutputs; i++) {
      const int column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
      const int chunk = column % kPanelColumns / 8 ^ key % 8;
      const unsigned char* s_element =
          s_value + column / kPanelColumns * Config::kKeyPanelBytes + key * kPanelRowBytes + chunk * 16;
      const float value = static_cast<float>(reinterpret_cast<const Element*>(s_element)[column % 8]);
      if (!(fabsf(value) < infinity()) && weight[i / 2 % 2] != 0.f) out[i] += weight[i / 2 % 2] * value;
    }
  }
  constexpr int kConsumers = Config::kWarpgroups * kWarpgroupSize;
  ptx::barrier_sync(Config::kRepairBarrier, kConsumers);  // all have read these rows
#pragma unroll 1
  for (int key = threadIdx.x / kWarpSize % Config::kConsumerWarps; key < kTileKey; key += Config::kConsumerWarps)
    clear_non_finite<Element, Config::kPanelsV, Config::kKeyPanelBytes>(s_value, key);
  ptx::fence_proxy_async_shared();
  ptx::barrier_sync(Config::kRepairBarrier, kConsumers);  // and each has cleared its share of them
}

}  // namespace selfattn::cuda::sm90
