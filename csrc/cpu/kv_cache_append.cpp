// append_kv_cache and qk_norm_rope_append on CPU: rows copied to their slots.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstring>
#include <vector>

#include "cpu/token_view.h"
#include "kv_cache/append.h"

namespace selfattn {
namespace {

using namespace cpu;

/// Where a token of the call goes; a page of -1: nowhere.
struct Slot {
  int64_t page, offset;
};

/// (B * S,) as integers of one type.
at::Tensor flat_integers(const at::Tensor& integers) { return integers.to(at::kLong).reshape({-1}).contiguous(); }

/// Throws c10::ValueError for values out of range, before anything is written.
std::vector<Slot> find_slots(const AppendCall& call) {
  const int64_t tokens = call.key.size(0) * call.key.size(1), length = call.key.size(1);
  const int64_t pages = call.key_cache.size(0), page_size = call.key_cache.size(1);
  const int64_t columns = call.page_table ? call.page_table->size(1) : 1;
  const int64_t rows = call.page_table ? call.page_table->size(0) : pages;
  const at::Tensor positions = flat_integers(call.positions);
  const at::Tensor ids = call.segment_ids ? flat_integers(*call.segment_ids) : at::Tensor();
  const at::Tensor table = call.page_table ? flat_integers(*call.page_table) : at::Tensor();
  std::vector<Slot> slots(tokens, {-1, 0});
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t row = ids.defined() ? ids.const_data_ptr<int64_t>()[token] : token / length;
    if (row < 0) continue;
    TORCH_CHECK_VALUE(row < rows,
                      "selfattn: segment_ids must hold rows of the cache, or negative values; got a larger one");
    const int64_t position = positions.const_data_ptr<int64_t>()[token];
    TORCH_CHECK_VALUE(0 <= position && position < columns * page_size,
                      "selfattn: positions must hold slots of a row of the cache, from 0 to below its capacity "
                      "(page_size times the pages of a row); got another");
    const int64_t column = position / page_size;
    const int64_t page = table.defined() ? table.const_data_ptr<int64_t>()[row * columns + column] : row;
    TORCH_CHECK_VALUE(0 <= page && page < pages,
                      "selfattn: page_table must hold pages of the cache where tokens are written; got another");
    slots[token] = {page, position - column * page_size};
  }
  return slots;
}

/// The heads of tokens (B, S, NKV, D) into their slots of a cache (P, page_size, NKV, D).
void copy_tokens(const at::Tensor& tokens, const std::vector<Slot>& slots, const at::Tensor& cache) {
  const at::Tensor rows = with_contiguous_rows(tokens);
  const int64_t length = rows.size(1), heads = rows.size(2), dim = rows.size(3), bytes = rows.element_size();
  const char* const from = static_cast<const char*>(rows.const_data_ptr());
  char* const to = static_cast<char*>(cache.mutable_data_ptr());
  const bool is_row_contiguous = dim <= 1 || cache.stride(3) == 1;
  const int64_t grain = std::max<int64_t>(kRangeElements / std::max<int64_t>(heads * dim, 1), 1);
  at::parallel_for(0, static_cast<int64_t>(slots.size()), grain, [&](int64_t first, int64_t end) {
    for (int64_t token = first; token < end; ++token) {
      const auto [page, offset] = slots[token];
      if (page < 0) continue;
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t src = token / length * rows.stride(0) + token % length * rows.stride(1) + head * rows.stride(2);
        const int64_t dst = page * cache.stride(0) + offset * cache.stride(1) + head * cache.stride(2);
        if (is_row_contiguous) {
          std::memcpy(to + dst * bytes, from + src * bytes, dim * bytes);
          continue;
        }
        for (int64_t i = 0; i < dim; ++i) {
          std::memcpy(to + (dst + i * cache.stride(3)) * bytes, from + (src + i) * bytes, bytes);
        }
      }
    }
  });
}

void write(const AppendCall& call) {
  if (call.key.size(0) == 0 || call.key.size(1) == 0) return;
  const std::vector<Slot> slots = find_slots(call);
  copy_tokens(call.key, slots, call.key_cache);
  copy_tokens(call.value, slots, call.value_cache);
}

at::Tensor norm_rope_then_write(const NormRopeAppendCall& call) {
  const auto [query, key] = qk_norm_rope(call.norm_rope);
  AppendCall append = call.append;
  append.key = key;
  write(append);
  return query;
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, CPU, m) {
  using namespace selfattn;
  m.impl("append_kv_cache", TORCH_FN(append_from_schema<write>));
  m.impl("qk_norm_rope_append", TORCH_FN(norm_rope_append_from_schema<norm_rope_then_write>));
}
