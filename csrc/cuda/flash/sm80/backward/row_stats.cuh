// What the kernels know of a row of queries, and what they do about rows out of the ordinary.
//
// Two statistics: lse * log2(e), so that P = exp2(score * c - lse * log2(e)) with c = scale * log2(e), and delta =
// rowsum(dO * O) - dlse, so that dS = P (dP - delta). They are computed by the kernel ahead (preprocess.cuh).
//
// A pair whose P is 0 contributes nothing. That needs care where something is not finite: the tensor cores multiply 0
// by it, and 0 times NaN is NaN.
//   dV_j += P_ij dO_i    dK_j += dS_ij Q_i    dQ_i += dS_ij K_j    with    dP_ij = dO_i V_j
// The fast pass does not ask. Whatever it spoils shows in its sums, since nothing that is added to NaN or infinity
// makes it finite again; a tile whose sums are not finite is then computed once more by the same warps, with dS = 0
// where P is 0, and with the rows of Q, dO and K cleared that are not finite. No allowed pair is lost by that: a query
// that is not finite, or that gives weight to a key that is not, has lse or delta not finite. Its statistic is NaN
// then, so that its P and dS are, and NaN times a cleared row is NaN.
//
// Large logits: half an ulp of a large lse * log2(e) is felt in P. Tiles with such rows are computed once more, too.
// The careful pass rounds score * scale as the forward pass did for lse, so that the difference of both is exactly 0
// for a key that has all the weight.
#pragma once
#include "flash/sm80/operand.cuh"
#include "flash/tile/online_softmax.cuh"
#include "ptx/arithmetic.cuh"

namespace selfattn::cuda::sm80 {

struct RowStats {
  float lse_log2, delta;
};

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < infinity(); }

// Of a row with this lse and this rowsum(dO * O) - dlse. Rows that see no key, or whose sink has all the weight, and
// those past the end (lse -inf) get infinity, which makes each P of theirs 0.
__device__ __forceinline__ RowStats make_row_stats(float lse, float delta) {
  constexpr float kLargest = 3.4028234e38f;
  if (fabsf(lse) == infinity()) return {infinity(), 0.f};
  if (!is_finite(lse) || !is_finite(delta)) return {NAN, 0.f};
  return {fminf(fmaxf(lse * kLog2E, -kLargest), kLargest), delta};
}

// Whether P is to be computed with more care.
__device__ __forceinline__ bool is_large(float lse_log2) {
  return fabsf(lse_log2) >= kExactFrom && is_finite(lse_log2);
}

// The exponent of P, and the same of a row with large logits.
__device__ __forceinline__ float exponent(float score, float scale_log2, float lse_log2) {
  return fmaf(score, scale_log2, -lse_log2);
}
__device__ __forceinline__ float exact_exponent(float score, float scale, float lse) {
  return (__fmul_rn(score, scale) - lse) * kLog2E;
}

template <bool kIsRepair>
__device__ __forceinline__ float score_gradient(float weight, float dp, float delta) {
  if (kIsRepair && weight == 0.f) return 0.f;
  return weight * (dp - delta);
}

// Clears the rows first .. first + rows - 1 of a tile that are not finite. By all kWarps warps together; nobody waits.
template <class Element, class Tile, int kWarps>
__device__ __noinline__ void clear_non_finite_rows(unsigned char* s_tile, int first, int rows) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
  for (int row = first + threadIdx.x / kWarpSize; row < first + rows; row += kWarps) {
    uint4* s_chunk = reinterpret_cast<uint4*>(s_tile + Tile::place(row, lane));
    static_assert(Tile::kChunks <= kWarpSize);
    ptx::FiniteTest<Element> finite;
    if (lane < Tile::kChunks) {
      const uint4 chunk = *s_chunk;
      finite.add(chunk.x), finite.add(chunk.y), finite.add(chunk.z), finite.add(chunk.w);
    }
    if (__all_sync(~0u, finite.all_finite())) continue;
    if (lane < Tile::kChunks) *s_chunk = uint4{};
  }
}

}  // namespace selfattn::cuda::sm80
