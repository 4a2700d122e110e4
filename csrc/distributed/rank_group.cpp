#include "distributed/rank_group.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/util/Exception.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

// Weak: where PyTorch is built without torch.distributed there is no such function, and the library loads all the same.
namespace c10d {
__attribute__((weak)) c10::intrusive_ptr<ProcessGroup> resolve_process_group(const std::string& group_name);
}

namespace selfattn {

using at::Tensor;

namespace {

constexpr const char* kNeedsDistributed =
    "selfattn: context parallelism needs a PyTorch with torch.distributed; this one is built without";

/// Boxed: the C++ types of these operators are PyTorch's own affair.
template <typename... Arguments>
Tensor call(const char* collective, const Arguments&... arguments) {
  const auto op = c10::Dispatcher::singleton().findSchema({collective, ""});
  TORCH_CHECK_NOT_IMPLEMENTED(op, kNeedsDistributed);
  torch::jit::Stack stack;
  torch::jit::push(stack, arguments...);
  op->callBoxed(stack);
  return torch::jit::pop(stack).toTensor();
}

}  // namespace

void check_group_size(int64_t size, const char* argument) {
  constexpr int64_t kMost = int64_t{1} << 20;
  TORCH_CHECK_VALUE(size >= 1 && size <= kMost, "selfattn: ", argument, " must be from 1 to ", kMost, "; got ", size);
}

int64_t RankGroup::rank() const {
  if (size_ == 1 && name_.empty()) return 0;
  TORCH_CHECK_NOT_IMPLEMENTED(&c10d::resolve_process_group != nullptr, kNeedsDistributed);
  const auto group = c10d::resolve_process_group(name_);
  TORCH_CHECK_VALUE(group->getSize() == size_, "selfattn: ", argument_, " must be that of the group '", name_, "', ",
                    group->getSize(), "; got ", size_);
  return group->getRank();
}

Tensor RankGroup::start_gather(const Tensor& own) const {
  return call("_c10d_functional::all_gather_into_tensor", own.unsqueeze(0), size_, name_);
}

Tensor RankGroup::start_exchange(const Tensor& by_rank) const {
  const std::vector<int64_t> one_each(size_, 1);
  return call("_c10d_functional::all_to_all_single", by_rank, one_each, one_each, name_);
}

Tensor RankGroup::start_sum(const Tensor& by_rank) const {
  return call("_c10d_functional::reduce_scatter_tensor", by_rank, "sum", size_, name_);
}

Tensor RankGroup::finish(const Tensor& started) { return call("_c10d_functional::wait_tensor", started); }

}  // namespace selfattn
