// What the runtime is asked once a device: asked at every launch it would cost more than the launch's own work. Only
// successes are kept. The statics must stay private to the library (hidden visibility): a second copy of it in the
// process has kernels of its own to be allowed their shared memory.
#pragma once
#include <cuda_runtime_api.h>

#include <atomic>
#include <climits>
#include <cstdlib>
#include <stdexcept>
#include <string>

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

// The SMs of a kernel that would take all of them but for those left free.
inline int sms_to_take(int sms, int left_free) { return sms > left_free ? sms - left_free : 1; }

// KiB, for tests: the kernels then do with so much as on another card. Read once.
inline int shared_memory_limit() {
  static const int bytes = [] {
    const char* value = std::getenv("SELFATTN_SHARED_MEMORY");
    if (!value || !*value) return INT_MAX;
    char* end = nullptr;
    const long kib = std::strtol(value, &end, 10);
    if (*end || kib < 1 || kib > 1024) {
      throw std::runtime_error(std::string("selfattn: the environment variable SELFATTN_SHARED_MEMORY must be a number "
                                           "of KiB or unset; got '") +
                               value + "'");
    }
    return int(kib) * 1024;
  }();
  return bytes;
}

// The dynamic and static shared memory that a thread block may have, in bytes; less than on Hopper on most cards.
inline cudaError_t find_shared_memory(int device, int& bytes) {
  static std::atomic<int> limits[kMaxDevices];
  if (device >= kMaxDevices) return cudaErrorInvalidDevice;
  bytes = limits[device].load(std::memory_order_relaxed);
  if (bytes) return cudaSuccess;
  const cudaError_t status = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  bytes = bytes < shared_memory_limit() ? bytes : shared_memory_limit();
  if (status == cudaSuccess) limits[device].store(bytes, std::memory_order_relaxed);
  return status;
}

// The version (10 * major + minor) of the PTX from which this build's code of kKernel for a device was made, -1 where
// there is none. The device need not be the current one.
template <auto kKernel>
int find_ptx_version(int device) {
  constexpr int kUnknown = 0, kNone = -1;
  static std::atomic<int> versions[kMaxDevices];
  if (device >= kMaxDevices) return kNone;
  int version = versions[device].load(std::memory_order_relaxed);
  if (version == kUnknown) {
    int current = device;
    cudaGetDevice(&current);
    cudaSetDevice(device);
    cudaFuncAttributes attributes;
    version = cudaFuncGetAttributes(&attributes, kKernel) == cudaSuccess ? attributes.ptxVersion : kNone;
    cudaSetDevice(current);
    if (version == kNone) cudaGetLastError();  // an answer, not an error that a later check should find
    versions[device].store(version, std::memory_order_relaxed);
  }
  return version;
}

// Whether this build holds kKernel for the device.
template <auto kKernel>
bool is_built_for(int device) {
  return find_ptx_version<kKernel>(device) >= 0;
}

// Whether kKernel was made for Hopper or a later card, and so may do what these can, where its source says so.
template <auto kKernel>
bool is_built_for_hopper(int device) {
  constexpr int kHopper = 90;
  return find_ptx_version<kKernel>(device) >= kHopper;
}

// Whether kKernel may start before the kernel ahead of it has ended (ptx/launch.cuh): from Hopper on, unless it was
// made from older PTX, in which it does not wait.
template <auto kKernel>
bool has_dependent_launch(int device) {
  return is_built_for_hopper<kKernel>(device);
}

// The attribute of a launch that asks for it.
inline cudaLaunchAttribute dependent_launch() {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

// Lets `kernel`, the only one of Config that asks for so much, take `bytes` of dynamic shared memory.
template <class Config, class Kernel>
cudaError_t allow_shared_memory(Kernel kernel, int bytes, int device) {
  static std::atomic<bool> is_allowed[kMaxDevices];
  if (device >= kMaxDevices) return cudaErrorInvalidDevice;
  if (is_allowed[device].load(std::memory_order_relaxed)) return cudaSuccess;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status == cudaSuccess) is_allowed[device].store(true, std::memory_order_relaxed);
  return status;
}

}  // namespace selfattn::cuda
