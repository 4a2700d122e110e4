#include "segment/segment_ids.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/_assert_async.h>
#include <ATen/ops/logical_and.h>

#include <limits>

#include "common/dense_tensor.h"
#include "common/function_transform.h"
#include "common/plain_tensor.h"

namespace selfattn {

bool has_readable_values(const at::Tensor& tensor) {
  return tensor.is_cpu() && is_plain(tensor) && !is_differentiation_transform_active();
}

void check_values(const at::Tensor& mapped_condition, const std::string& message) {
  const at::Tensor condition = without_maps(mapped_condition);
  if (has_readable_values(condition)) {
    TORCH_CHECK_VALUE(condition.all().item<bool>(), message);
  } else if (!condition.is_meta() && !is_differentiation_transform_active()) {
    at::_assert_async(condition.all(), message);
  }
}

void check_integer_rows(const at::Tensor& integers, const char* name) {
  check_integers(integers, name);
  TORCH_CHECK_VALUE(integers.dim() == 2, "selfattn: ", name, " must have two dimensions (B, S); got ", integers.dim());
}

at::Tensor as_int32(const at::Tensor& integers, const char* name) {
  check_integer_rows(integers, name);
  if (integers.scalar_type() == at::kInt) return integers;
  const at::Tensor fits =
      at::logical_and(integers >= std::numeric_limits<int32_t>::min(), integers <= std::numeric_limits<int32_t>::max());
  check_values(fits, std::string("selfattn: ") + name + " must hold values that fit in int32; got a larger one");
  return integers.to(at::kInt);
}

std::pair<at::Tensor, at::Tensor> as_int32(const at::Tensor& of_queries, const char* name, const at::Tensor& of_keys,
                                           const char* key_name) {
  const at::Tensor query = as_int32(of_queries, name);
  return {query, of_keys.is_same(of_queries) ? query : as_int32(of_keys, key_name)};
}

std::pair<at::Tensor, at::Tensor> segment_ids_as_int32(const at::Tensor& segment_ids,
                                                       const at::Tensor& kv_segment_ids) {
  return as_int32(segment_ids, "segment_ids", kv_segment_ids, "kv_segment_ids");
}

at::Tensor same_segment(const at::Tensor& query_segment_ids, const at::Tensor& key_segment_ids) {
  const at::Tensor query = query_segment_ids.unsqueeze(1).unsqueeze(3);  // (B, 1, Sq, 1)
  const at::Tensor key = key_segment_ids.unsqueeze(1).unsqueeze(2);      // (B, 1, 1, Skv)
  return at::logical_and(query == key, query >= 0);
}

}  // namespace selfattn
