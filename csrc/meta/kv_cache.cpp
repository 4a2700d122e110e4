// Shapes and dtypes of the results of flash_attention_kv_cache, for tracing. Every result is contiguous.
#include <torch/library.h>

#include "kv_cache/attention_op.h"

TORCH_LIBRARY_IMPL(selfattn, Meta, m) {
  using namespace selfattn;
  m.impl("flash_attention_kv_cache", TORCH_FN(flash_kv_cache_from_schema<checked<empty_kv_cache_results>>));
}
