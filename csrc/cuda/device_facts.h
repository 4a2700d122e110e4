// What the runtime is asked once a device: asked at every launch it would cost more than the launch's own work. Only
// successes are kept. The statics must stay private to the library (hidden visibility): a second copy of it in the
// process has kernels of its own to be allowed their shared memory.
#pragma once
#include <cuda_runtime_api.h>

#include <atomic>

namespace selfattn::cuda {

constexpr int kMaxDevices = 64;

// The current device and its SMs (streaming multiprocessors).
inline cudaError_t find_device(int& device, int& sms) {
  static std::atomic<int> counts[kMaxDevices];
  if (const cudaError_t status = cudaGetDevice(&device)) return status;
  if (device >= kMaxDevices) return cudaErrorInvalidDevice;
  sms = counts[device].load(std::memory_order_relaxed);
  if (sms) return cudaSuccess;
  const cudaError_t status = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess) counts[device].store(sms, std::memory_order_relaxed);
  return status;
}

// Lets `kernel`, the only one of Config that asks for so much, take `bytes` of dynamic shared memory.
template <class Config, class Kernel>
cudaError_t allow_shared_memory(Kernel kernel, int bytes, int device) {
  static std::atomic<bool> is_allowed[kMaxDevices];
  if (is_allowed[device].load(std::memory_order_relaxed)) return cudaSuccess;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status == cudaSuccess) is_allowed[device].store(true, std::memory_order_relaxed);
  return status;
}

}  // namespace selfattn::cuda
