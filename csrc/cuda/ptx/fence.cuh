// Orders accesses between the ordinary and the asynchronous proxy (TMA, tensor cores).
#pragma once

namespace selfattn::ptx {

// After this thread's ordinary writes to shared memory, before the barrier behind which TMA or wgmma reads them.
__device__ __forceinline__ void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same for global memory.
__device__ __forceinline__ void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

}  // namespace selfattn::ptx
