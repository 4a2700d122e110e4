#include "distributed/packed_tokens.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>

#include <algorithm>

#include "common/token_order.h"

namespace selfattn {
namespace {

using at::Tensor;

// ATen's copies between tensors of other strides move one element a thread, 2 bytes of bfloat16, at a fraction of the
// memory's speed. Copied are bits, so that elements of 16 bytes, the widest dtype there is, serve as well.
constexpr auto kWord = at::kComplexDouble;

bool is_made_of_words(const Tensor& tensor) {
  constexpr int64_t kWordBytes = 16;
  const int64_t in_word = kWordBytes / tensor.element_size();
  const auto is_whole = [&](int64_t elements) { return elements % in_word == 0; };
  return tensor.dim() > 0 && tensor.stride(-1) == 1 && is_whole(tensor.size(-1)) && is_whole(tensor.storage_offset()) &&
         std::all_of(tensor.strides().begin(), tensor.strides().end() - 1, is_whole) &&
         reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kWordBytes == 0;
}

/// (B, n * s, H, D) -> (n, B, s, H * D)
Tensor by_rank(const Tensor& rows, int64_t ranks) { return rows.flatten(2).unflatten(1, {ranks, -1}).transpose(0, 1); }

}  // namespace

Tensor pack_features(const std::vector<Tensor>& tensors) {
  if (!std::all_of(tensors.begin(), tensors.end(), is_made_of_words)) {
    return tensors.size() == 1 ? tensors[0].contiguous() : at::cat(tensors, -1);
  }
  const auto dtype = tensors[0].scalar_type();
  if (tensors.size() == 1) return tensors[0].view(kWord).contiguous().view(dtype);
  std::vector<Tensor> words;
  for (const Tensor& tensor : tensors) words.push_back(tensor.view(kWord));
  return at::cat(words, -1).view(dtype);
}

void copy_features(const Tensor& result, const Tensor& source) {
  if (result.scalar_type() == source.scalar_type() && is_made_of_words(result) && is_made_of_words(source)) {
    result.view(kWord).copy_(source.view(kWord));
  } else {
    result.copy_(source);
  }
}

TokensOfRanks::TokensOfRanks(const Tensor& order, int64_t ranks) : ranks_(ranks) {
  if (!order.defined()) return;
  if (order.size(0) == 1) {
    order_ = order.flatten();
    return;
  }
  const Tensor as_they_come = at::arange(order.numel(), order.options()).view({ranks, order.size(0), -1});  // (n, B, s)
  order_ = as_they_come.transpose(0, 1).flatten(1).gather(1, order).flatten();
}

Tensor TokensOfRanks::as_rows(const Tensor& by_rank) const {
  const int64_t batch = by_rank.size(1), tokens = ranks_ * by_rank.size(2), features = by_rank.size(3);
  const Tensor rows =
      order_.defined() ? by_rank.flatten(0, 2).index_select(0, order_) : pack_features({by_rank.transpose(0, 1)});
  return rows.view({batch, tokens, features});
}

Tensor TokensOfRanks::pack_by_rank(const std::vector<Tensor>& rows) {
  if (!order_.defined()) {
    std::vector<Tensor> tensors;
    for (const Tensor& tensor : rows) tensors.push_back(by_rank(tensor, ranks_));
    return pack_features(tensors);
  }
  if (!inverse_.defined()) inverse_ = inverse_of(order_);
  int64_t features = 0;
  for (const Tensor& tensor : rows) features += tensor.size(2) * tensor.size(3);
  const Tensor packed = at::empty({inverse_.numel(), features}, rows[0].options());
  int64_t begin = 0;
  for (const Tensor& tensor : rows) {
    const Tensor heads = tensor.flatten(2).flatten(0, 1);
    // Written where it travels: index_select writes any strides.
    Tensor place = packed.narrow(1, begin, heads.size(1));
    at::index_select_out(place, heads, 0, inverse_);
    begin += heads.size(1);
  }
  return packed.view({ranks_, rows[0].size(0), rows[0].size(1) / ranks_, features});
}

}  // namespace selfattn
