// Prints, for cmake/check_ptxas.py, the dynamic shared memory that the kernels of the family sm80 ask for, which ptxas
// does not know: a line a kernel and pair of head dimensions, with its bytes. Needs no GPU.
// Builds alone: nvcc -std=c++20 -Icsrc -Icsrc/cuda tests/cuda/shared_memory.cu
#include <algorithm>
#include <cstdio>

#include "flash/sm80/backward/config.h"
#include "flash/sm80/forward/config.h"

using namespace selfattn::cuda::sm80;

template <int kDimQk, int kDimV, MaskKind kMask>
constexpr size_t forward_bytes() {
  return sizeof(
      typename ForwardConfig<void, kDimQk, kDimV, kMask, ForwardTiles<kDimQk, kDimV>::kMostBuffers>::SharedStorage);
}

template <int kDimQk, int kDimV>
void print_kernels() {
  const auto print = [](const char* kernel, size_t bytes) {
    std::printf("%s %d %d %zu\n", kernel, kDimQk, kDimV, bytes);
  };
  print("flash_attention_forward_kernel",
        std::max({forward_bytes<kDimQk, kDimV, MaskKind::kFull>(), forward_bytes<kDimQk, kDimV, MaskKind::kCausal>(),
                  forward_bytes<kDimQk, kDimV, MaskKind::kMasked>()}));
  print("flash_attention_backward_kernel", sizeof(typename SinglePassConfig<void, kDimQk, kDimV>::SharedStorage));
  print("flash_attention_backward_postprocess_kernel", 0);
  print("flash_attention_backward_dq_kernel", sizeof(typename DqConfig<void, kDimQk, kDimV>::SharedStorage));
  print("flash_attention_backward_dkdv_kernel", sizeof(typename DkdvConfig<void, kDimQk, kDimV>::SharedStorage));
}

int main() {  // the instantiations
  print_kernels<64, 64>(), print_kernels<96, 96>(), print_kernels<128, 128>();
  print_kernels<192, 128>(), print_kernels<192, 192>(), print_kernels<256, 256>();
}
