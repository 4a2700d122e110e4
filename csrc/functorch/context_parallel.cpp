// No vmap of what ranks do together: PyTorch would loop over the map, as often on each rank as its own map is long.
#include <c10/util/Exception.h>
#include <torch/library.h>

namespace selfattn {
namespace {

void refuse_map(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "selfattn: ", op.schema().name(),
                              " has no vmap (nor is_grads_batched); a batch is the first dimension of q, k and v");
}

void register_refusals(torch::Library& m) {
  for (const char* name : {"context_parallel_attention_forward", "context_parallel_attention_backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<refuse_map>());
  }
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, FuncTorchBatched, m) { selfattn::register_refusals(m); }
TORCH_LIBRARY_IMPL(selfattn, Batched, m) { selfattn::register_refusals(m); }
