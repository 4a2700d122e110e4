#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

namespace selfattn {

/// Throws c10::TypeError where `tensor` is nested, sparse, quantised, in MKL-DNN's layout or not there; the message
/// names the argument and says what to do.
void check_dense(const at::Tensor& tensor, const char* name);

/// The same for an argument that may be left out.
inline void check_dense(const std::optional<at::Tensor>& tensor, const char* name) {
  if (tensor) check_dense(*tensor, name);
}

/// Whether the library computes in it: float64, float32, bfloat16 or float16.
bool is_supported_dtype(at::ScalarType dtype);

/// The dtype that formulas in ATen operators compute in: float64 for float64, float32 for every other.
at::ScalarType compute_dtype(const at::Tensor& tensor);

// Checks of one argument, which throw c10::TypeError. `name` is the argument's; `owner` is the one that it has to
// match.

/// Dense, in a dtype that the library computes in.
void check_floating_point(const at::Tensor& tensor, const char* name);
/// The same, on a device.
void check_floating_point(const at::Tensor& tensor, const char* name, at::Device device, const char* owner);
/// Dense, int32 or int64.
void check_integers(const at::Tensor& tensor, const char* name);
void check_device(const at::Tensor& tensor, const char* name, at::Device device, const char* owner);
void check_dtype(const at::Tensor& tensor, const char* name, at::ScalarType dtype, const char* owner);

/// Gives every operator of the library a kernel of the dispatch key that throws for the first argument that is not
/// dense. Without it such a tensor would end in PyTorch's "Could not run ..." before any check.
void refuse_tensors_of_key(torch::Library& library);

/// For autograd's key of all tensors that have none of their own, dense ones among them (meta tensors under a
/// transform): the operators that are made of others check that their arguments are dense, and go on.
void check_tensors_of_other_keys(torch::Library& library);

}  // namespace selfattn
