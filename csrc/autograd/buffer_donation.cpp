#include "autograd/buffer_donation.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <utility>

#include "common/function_transform.h"
#include "common/plain_tensor.h"

namespace selfattn {
namespace {

thread_local bool buffers_are_donated = false;

/// How many tensors share the memory of one that nobody else holds: a view brings its base.
size_t tensors_of_memory(const at::Tensor& tensor) {
  return tensor.is_view() && tensor._base().use_count() == 1 ? 2 : 1;
}

/// A saved input is one tensor, held by the node and by the caller.
bool is_last_use_of_input(const at::Tensor& saved) {
  return saved.use_count() == 2 && saved.storage().use_count() == tensors_of_memory(saved) && saved.is_contiguous();
}

/// A saved output is a tensor of the node's own, and a second one of the caller.
bool is_last_use_of_output(const at::Tensor& saved) {
  return saved.use_count() == 1 && saved.storage().use_count() == 2 && saved.is_contiguous();
}

}  // namespace

DonatedBuffers::DonatedBuffers() : before_(std::exchange(buffers_are_donated, true)) {}

DonatedBuffers::~DonatedBuffers() { buffers_are_donated = before_; }

bool DonatedBuffers::include(const at::Tensor& tensor) {
  return buffers_are_donated && is_plain(tensor) && !at::SavedTensorDefaultHooks::get_hooks();
}

bool DonatedBuffers::may_be_written(at::TensorList grads) {
  return !is_function_transform_active() && std::all_of(grads.begin(), grads.end(), [](const at::Tensor& grad) {
    return !grad.defined() || (is_plain(grad) && !is_wrapped_by_transform(grad));
  });
}

GradientMemory donated_memory(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                              const at::Tensor& out) {
  GradientMemory memory;
  if (at::GradMode::is_enabled() || torch::autograd::get_current_graph_task_keep_graph()) return memory;
  // As tensors without a history: they become gradients.
  const bool takes_key = is_last_use_of_input(key), takes_value = is_last_use_of_input(value);
  if (is_last_use_of_output(out) && out.sizes() == query.sizes()) memory.query = out.variable_data();
  if (takes_key) memory.key = key.variable_data();
  if (takes_value) memory.value = value.variable_data();
  return memory;
}

}  // namespace selfattn
