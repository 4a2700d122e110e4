#include "common/dense_tensor.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/util/Exception.h>

#include "common/composite_operators.h"

namespace selfattn {
namespace {

/// What the tensor is instead of a dense one, and the cure; nothing where it is one.
std::optional<std::string> reason_against(const at::Tensor& tensor) {
  if (tensor.is_nested()) {
    return "a nested one; pack the documents into rows and give segment_ids (segment_ids_from_cu_seqlens makes them "
           "of the offsets)";
  }
  if (tensor.is_quantized()) return c10::str("a quantised one, ", tensor.scalar_type(), "; call dequantize()");
  if (tensor.layout() != at::kStrided) return c10::str("one of layout ", tensor.layout(), "; call to_dense()");
  return std::nullopt;
}

void check_dense_arguments(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  const auto& arguments = op.schema().arguments();
  const auto values = torch::jit::last(stack, arguments.size());
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (values[i].isTensor()) check_dense(values[i].toTensor(), arguments[i].name().c_str());
  }
}

void check_then_call_parts(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  check_dense_arguments(op, *stack);
  op.callBoxedForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd, *stack);
}

void refuse_others(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  check_dense_arguments(op, *stack);
  TORCH_CHECK_NOT_IMPLEMENTED(false, "selfattn: ", op.schema().name(),
                              " has no kernel for the kind of tensor given, nor for any but dense ones");
}

}  // namespace

void check_dense(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.defined(), "selfattn: ", name, " must be a tensor; got None");
  const auto reason = reason_against(tensor);
  TORCH_CHECK_TYPE(!reason, "selfattn: ", name, " must be a dense tensor; got ", *reason);
}

bool is_supported_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble;
}

at::ScalarType compute_dtype(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_floating_point(const at::Tensor& tensor, const char* name) {
  check_dense(tensor, name);
  TORCH_CHECK_TYPE(is_supported_dtype(tensor.scalar_type()), "selfattn: ", name,
                   " must be floating point (float64, float32, bfloat16 or float16); got ", tensor.scalar_type());
}

void check_floating_point(const at::Tensor& tensor, const char* name, at::Device device, const char* owner) {
  check_floating_point(tensor, name);
  check_device(tensor, name, device, owner);
}

void check_integers(const at::Tensor& tensor, const char* name) {
  check_dense(tensor, name);
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kInt || tensor.scalar_type() == at::kLong, "selfattn: ", name,
                   " must be int32 or int64; got ", tensor.scalar_type());
}

void check_device(const at::Tensor& tensor, const char* name, at::Device device, const char* owner) {
  TORCH_CHECK_TYPE(tensor.device() == device, "selfattn: ", name, " must be on the device of ", owner, ", ", device,
                   "; got ", tensor.device());
}

void check_dtype(const at::Tensor& tensor, const char* name, at::ScalarType dtype, const char* owner) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, "selfattn: ", name, " must have the dtype of ", owner, ", ", dtype,
                   "; got ", tensor.scalar_type());
}

void refuse_tensors_of_key(torch::Library& library) {
  for (const c10::OperatorName& op : c10::Dispatcher::singleton().getAllOpNames()) {
    if (op.getNamespace() != "selfattn") continue;
    library.impl(c10::toString(op).c_str(), torch::CppFunction::makeFromBoxedFunction<&refuse_others>());
  }
}

void check_tensors_of_other_keys(torch::Library& library) {
  for (const char* name : kCompositeOperators)
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&check_then_call_parts>());
}

}  // namespace selfattn
