// Compiled once for each instruction set: see cmake/cpu_kernels.cmake.
#include "cpu/flash_kernels.h"

#include "cpu/kernels/backward.h"
#include "cpu/kernels/forward.h"

namespace selfattn::cpu {
inline namespace CPU_CAPABILITY {

template <typename T, typename E>
constexpr FlashKernels make_kernels() {
  using F = Forward<T, E>;
  using B = Backward<T, E>;
  FlashKernels kernels{};
  kernels.compute_bytes = sizeof(E);
  kernels.transposed_elements = Layout<E>::transposed_elements;
  kernels.rows_elements = Layout<E>::rows_elements;
  kernels.query_tile_bytes = B::query_tile_bytes;
  kernels.part_floats = F::part_floats;
  kernels.head_forward_workspace_bytes = F::head_workspace_bytes;
  kernels.attend_head = F::attend_head;
  kernels.forward_workspace_bytes = [](const ForwardProblem& p) { return F(p, nullptr).workspace_bytes(); };
  kernels.pack_forward = [](const ForwardProblem& p, int64_t task, void* space) { F(p, space).pack(task); };
  kernels.attend = [](const ForwardProblem& p, int64_t task, void* space) { F(p, space).attend(task); };
  kernels.merge = [](const ForwardProblem& p, int64_t task, void* space) { F(p, space).merge(task); };
  kernels.head_workspace_bytes = B::head_workspace_bytes;
  kernels.head_gradients = B::head_gradients;
  kernels.backward_workspace_bytes = [](const BackwardProblem& p) { return B(p, nullptr).workspace_bytes(); };
  kernels.key_spans = B::key_spans;
  kernels.pack_keys = [](const BackwardProblem& p, int64_t task, void* space) { B(p, space).pack_keys(task); };
  kernels.pack_queries = [](const BackwardProblem& p, int64_t task, void* space) { B(p, space).pack_queries(task); };
  kernels.key_gradients = [](const BackwardProblem& p, int64_t task, void* space) { B(p, space).key_gradients(task); };
  kernels.query_gradients = [](const BackwardProblem& p, int64_t task, void* space) {
    B(p, space).query_gradients(task);
  };
  return kernels;
}

extern const ByDtype<FlashKernels> kFlashKernels;
#if defined(__AVX512BF16__)
const ByDtype<FlashKernels> kFlashKernels{.of_bfloat16 = make_kernels<c10::BFloat16, c10::BFloat16>()};
#else
const ByDtype<FlashKernels> kFlashKernels{make_kernels<float, float>(), make_kernels<c10::BFloat16, float>(),
                                          make_kernels<c10::Half, float>()};
#endif

}  // namespace CPU_CAPABILITY
}  // namespace selfattn::cpu
