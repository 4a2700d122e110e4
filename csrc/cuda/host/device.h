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

// Whether a kernel may start before the one ahead of it has ended (ptx/launch.cuh): from Hopper on.
inline bool has_dependent_launch(int device) {
  static std::atomic<int> majors[kMaxDevices];
  int major = majors[device].load(std::memory_order_relaxed);
  if (!major && cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess)
    majors[device].store(major, std::memory_order_relaxed);
  constexpr int kHopper = 9;
  return major >= kHopper;
}

// The attribute of a launch that asks for it.
inline cudaLaunchAttribute dependent_launch() {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

// Whether this build holds `kernel` for the device, which need not be the current one.
template <class Kernel>
bool is_built_for(Kernel kernel, int device) {
  enum Answer : int { kUnknown, kYes, kNo };
  static std::atomic<int> answers[kMaxDevices];
  if (device >= kMaxDevices) return false;
  int answer = answers[device].load(std::memory_order_relaxed);
  if (answer == kUnknown) {
    int current = device;
    cudaGetDevice(&current);
    cudaSetDevice(device);
    cudaFuncAttributes attributes;
    answer = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess ? kYes : kNo;
    cudaSetDevice(current);
    if (answer == kNo) cudaGetLastError();  // an answer, not an error that a later check should find
    answers[device].store(answer, std::memory_order_relaxed);
  }
  return answer == kYes;
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
