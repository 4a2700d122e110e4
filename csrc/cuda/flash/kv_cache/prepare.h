// The kernel ahead of the one that attends.
#pragma once
#include "schedule.cuh"

namespace selfattn::cuda::kv_cache {

// Fills what params.schedule says is written by it. The kernel behind may start before this one has ended.
cudaError_t launch_prepare_kv_cache(const KernelParams& params, cudaStream_t stream);

}  // namespace selfattn::cuda::kv_cache
