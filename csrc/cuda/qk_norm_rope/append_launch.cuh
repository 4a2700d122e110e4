// params -> the kernel of one element type, head dimension and pairing.
#pragma once
#include "append.cuh"

namespace selfattn::cuda {

template <class Element, int kLanes>
cudaError_t launch_append_kernel(const AppendParams& params, cudaStream_t stream) {
  const NormRopeParams& p = params.norm_rope;
  const int blocks = p.sides[0].blocks + 2 * p.sides[1].blocks;
  if (blocks == 0) return cudaSuccess;
  if (p.pairs_halves) {
    qk_norm_rope_append_kernel<NormRopeConfig<Element, kLanes, true>><<<blocks, kVectorThreads, 0, stream>>>(params);
  } else {
    qk_norm_rope_append_kernel<NormRopeConfig<Element, kLanes, false>><<<blocks, kVectorThreads, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

template <class Element>
cudaError_t launch_append(const AppendParams& params, cudaStream_t stream) {
  if (params.norm_rope.dim <= 64) return launch_append_kernel<Element, 4>(params, stream);
  if (params.norm_rope.dim <= 128) return launch_append_kernel<Element, 8>(params, stream);
  return launch_append_kernel<Element, 16>(params, stream);
}

}  // namespace selfattn::cuda
