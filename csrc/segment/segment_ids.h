#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

namespace selfattn {

/// Whether the host may look at `tensor`'s elements: a plain CPU tensor, not one that a tracer, a functorch transform
/// or a tensor subclass stands in for.
bool has_readable_values(const at::Tensor& tensor);

/// Requires every element of the boolean tensor `condition`. Throws c10::ValueError with `message` where the host may
/// look at the values, and asserts on the device (PyTorch's habit for indices) elsewhere: never a synchronisation.
void check_values(const at::Tensor& condition, const std::string& message);

/// Requires segment ids or positions of rank 2, int32 or int64. `name` is the argument's, for the message.
void check_integer_rows(const at::Tensor& integers, const char* name);

/// The same, and gives them as int32, behind a check that they fit.
at::Tensor as_int32(const at::Tensor& integers, const char* name);

/// The same of queries and of keys; once where they are one tensor.
std::pair<at::Tensor, at::Tensor> as_int32(const at::Tensor& of_queries, const char* name, const at::Tensor& of_keys,
                                           const char* key_name);

/// Of segment ids.
std::pair<at::Tensor, at::Tensor> segment_ids_as_int32(const at::Tensor& segment_ids, const at::Tensor& kv_segment_ids);

/// True where the ids are equal and not negative: (B, Sq), (B, Skv) -> (B, 1, Sq, Skv).
at::Tensor same_segment(const at::Tensor& query_segment_ids, const at::Tensor& key_segment_ids);

}  // namespace selfattn
