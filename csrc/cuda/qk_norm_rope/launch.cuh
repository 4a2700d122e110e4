// params -> the kernel of one element type, head dimension and pairing.
#pragma once
#include "backward.cuh"
#include "forward.cuh"
#include "general.cuh"

namespace selfattn::cuda {

template <class Config>
cudaError_t launch_vector_kernel(const NormRopeParams& params, bool is_backward, int blocks, cudaStream_t stream) {
  if (is_backward) {
    qk_norm_rope_backward_kernel<Config><<<blocks, kVectorThreads, 0, stream>>>(params);
  } else {
    qk_norm_rope_forward_kernel<Config><<<blocks, kVectorThreads, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

template <class Element, bool kPairsHalves>
cudaError_t launch_by_dim(const NormRopeParams& params, bool is_backward, int blocks, cudaStream_t stream) {
  if (params.dim <= 64) {
    return launch_vector_kernel<NormRopeConfig<Element, 4, kPairsHalves>>(params, is_backward, blocks, stream);
  }
  if (params.dim <= 128) {
    return launch_vector_kernel<NormRopeConfig<Element, 8, kPairsHalves>>(params, is_backward, blocks, stream);
  }
  return launch_vector_kernel<NormRopeConfig<Element, 16, kPairsHalves>>(params, is_backward, blocks, stream);
}

template <class Element, bool kIsPartial>
cudaError_t launch_general_kernel(const NormRopeParams& params, bool is_backward, int blocks, cudaStream_t stream) {
  const int rotation_floats = (params.dim + 1) / 2 * 2;
  if (is_backward) {
    const size_t bytes = (rotation_floats + kGeneralWarps * params.dim) * sizeof(float);
    qk_norm_rope_general_kernel<Element, true, kIsPartial><<<blocks, kGeneralThreads, bytes, stream>>>(params);
  } else {
    qk_norm_rope_general_kernel<Element, false, kIsPartial>
        <<<blocks, kGeneralThreads, rotation_floats * sizeof(float), stream>>>(params);
  }
  return cudaGetLastError();
}

template <class Element>
cudaError_t launch_kernels(const NormRopeParams& params, bool is_backward, cudaStream_t stream) {
  const int blocks = params.sides[0].blocks + (params.num_sides > 1 ? params.sides[1].blocks : 0);
  if (blocks == 0) return cudaSuccess;
  if (!takes_vector_kernel(params)) {
    return params.rotary_dim < params.dim ? launch_general_kernel<Element, true>(params, is_backward, blocks, stream)
                                          : launch_general_kernel<Element, false>(params, is_backward, blocks, stream);
  }
  return params.pairs_halves ? launch_by_dim<Element, true>(params, is_backward, blocks, stream)
                             : launch_by_dim<Element, false>(params, is_backward, blocks, stream);
}

}  // namespace selfattn::cuda
