// The operator context_layout: host work on the ids of whole rows, once a batch.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <selfattn/context_parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "common/dispatch.h"
#include "distributed/deal_tokens.h"
#include "distributed/rank_group.h"
#include "segment/segment_ids.h"

namespace selfattn {
namespace {

using at::Tensor;

using LayoutResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int64_t, int64_t,
                                 bool>;  // as ContextLayout

ContextBalance parse_balance(c10::string_view name) {
  if (name == "documents") return ContextBalance::kDocuments;
  if (name == "head_tail") return ContextBalance::kHeadTail;
  if (name == "contiguous") return ContextBalance::kContiguous;
  TORCH_CHECK_VALUE(false, "selfattn: balance must be one of documents, head_tail, contiguous; got '", name, "'");
}

/// One row: the tokens of every rank in the order of their slots, and how many of them belong to split documents.
struct RowShards {
  std::vector<std::vector<int64_t>> tokens;
  std::vector<int64_t> split;
  /// The row's tokens of split documents, one document after another.
  std::vector<int64_t> split_tokens;
  /// Of the row's tokens: how many earlier ones have the same id, and the number of the document; 0 in padding.
  std::vector<int32_t> document_positions, document_numbers;
  /// Whether a rank has tokens of whole documents.
  std::vector<bool> has_whole;
  bool documents_are_runs;
};

RowShards shard_row(const int32_t* ids, int64_t length, int64_t ranks, ContextBalance balance) {
  const RowDocuments documents = find_documents(ids, length);
  const std::vector<int64_t> owners = deal_tokens(documents, length, ranks, balance);
  RowShards row{.tokens = std::vector<std::vector<int64_t>>(ranks),
                .split = std::vector<int64_t>(ranks),
                .document_positions = std::vector<int32_t>(length),
                .document_numbers = std::vector<int32_t>(length),
                .has_whole = std::vector<bool>(ranks),
                .documents_are_runs = documents.are_runs()};
  std::vector<int64_t> whole;
  for (int64_t document = 0; document < documents.count(); ++document) {
    const int64_t* tokens = documents.tokens.data() + documents.begins[document];
    const int64_t count = documents.length(document);
    const bool splits = std::any_of(tokens, tokens + count, [&](int64_t t) { return owners[t] != owners[tokens[0]]; });
    for (int64_t i = 0; i < count; ++i) {
      row.document_positions[tokens[i]] = static_cast<int32_t>(i);
      row.document_numbers[tokens[i]] = static_cast<int32_t>(document);
    }
    if (splits) {
      row.split_tokens.insert(row.split_tokens.end(), tokens, tokens + count);
    } else {
      whole.push_back(document);
    }
  }
  for (const int64_t token : row.split_tokens) row.tokens[owners[token]].push_back(token);
  for (int64_t rank = 0; rank < ranks; ++rank) row.split[rank] = static_cast<int64_t>(row.tokens[rank].size());
  for (const int64_t document : whole) {
    const auto begin = documents.tokens.begin() + documents.begins[document];
    const int64_t owner = owners[*begin];
    row.tokens[owner].insert(row.tokens[owner].end(), begin, begin + documents.length(document));
    row.has_whole[owner] = true;
  }
  for (const int64_t token : documents.padding) row.tokens[owners[token]].push_back(token);
  for (const auto& tokens : row.tokens) {
    TORCH_INTERNAL_ASSERT(static_cast<int64_t>(tokens.size()) <= (length + ranks - 1) / ranks);
  }
  return row;
}

int64_t round_up(int64_t number, int64_t step, int64_t most) {
  return std::min(most, number + (step - number % step) % step);
}

LayoutResults lay_out(const Tensor& segment_ids, int64_t group_rank, int64_t group_size, c10::string_view balance_name,
                      int64_t bucket) {
  check_integer_rows(segment_ids, "segment_ids");
  TORCH_CHECK_TYPE(has_readable_values(segment_ids),
                   "selfattn: segment_ids must be a plain tensor on the CPU, whose values the host reads; got one on ",
                   segment_ids.device());
  check_group_size(group_size);
  TORCH_CHECK_VALUE(group_rank >= 0 && group_rank < group_size,
                    "selfattn: group_rank must be at least 0 and below group_size, ", group_size, "; got ", group_rank);
  TORCH_CHECK_VALUE(bucket >= 1, "selfattn: bucket must be at least 1; got ", bucket);
  const ContextBalance balance = parse_balance(balance_name);
  const int64_t batch = segment_ids.size(0), length = segment_ids.size(1);
  TORCH_CHECK_VALUE(batch >= 1 && length >= 1 && length <= std::numeric_limits<int32_t>::max(),
                    "selfattn: segment_ids must have rows of at least 1 token, whose indices fit in int32; got shape ",
                    segment_ids.sizes());

  // What attention compares: calls would narrow them every time.
  const Tensor ids = as_int32(segment_ids, "segment_ids").contiguous();
  std::vector<RowShards> rows;
  for (int64_t b = 0; b < batch; ++b) {
    rows.push_back(shard_row(ids.const_data_ptr<int32_t>() + b * length, length, group_size, balance));
  }

  const int64_t slots = (length + group_size - 1) / group_size;
  int64_t most_split = 0;
  for (const RowShards& row : rows) {
    most_split = std::max(most_split, *std::max_element(row.split.begin(), row.split.end()));
  }
  const int64_t shared = round_up(most_split, std::min(bucket, slots), slots);
  int64_t local_start = shared;
  for (const RowShards& row : rows) {
    if (row.has_whole[group_rank]) local_start = std::min(local_start, row.split[group_rank] / bucket * bucket);
  }

  const auto longs = at::TensorOptions(at::kLong), ints = at::TensorOptions(at::kInt);
  const Tensor indices = at::full({batch, slots}, -1, longs), own_ids = at::full({batch, slots}, -1, ints);
  const Tensor positions = at::zeros({batch, slots}, ints), document_positions = at::zeros({batch, slots}, ints);
  const Tensor kv_ids = at::full({batch, group_size * shared}, -1, ints);
  const Tensor kv_positions = at::zeros({batch, group_size * shared}, ints);
  const Tensor kv_order = at::empty({batch, group_size * shared}, longs);
  const Tensor slot_of = at::full({batch, length}, -1, longs);
  auto* const indices_data = indices.mutable_data_ptr<int64_t>();
  auto* const own_ids_data = own_ids.mutable_data_ptr<int32_t>();
  auto* const positions_data = positions.mutable_data_ptr<int32_t>();
  auto* const document_positions_data = document_positions.mutable_data_ptr<int32_t>();
  auto* const kv_ids_data = kv_ids.mutable_data_ptr<int32_t>();
  auto* const kv_positions_data = kv_positions.mutable_data_ptr<int32_t>();
  auto* const kv_order_data = kv_order.mutable_data_ptr<int64_t>();
  auto* const slot_of_data = slot_of.mutable_data_ptr<int64_t>();
  const auto* const ids_data = ids.const_data_ptr<int32_t>();
  bool documents_are_runs = true;
  for (int64_t b = 0; b < batch; ++b) {
    const RowShards& row = rows[b];
    documents_are_runs = documents_are_runs && row.documents_are_runs;
    for (int64_t rank = 0; rank < group_size; ++rank) {
      const std::vector<int64_t>& tokens = row.tokens[rank];
      for (int64_t slot = 0; slot < static_cast<int64_t>(tokens.size()); ++slot) {
        const int64_t token = tokens[slot];
        slot_of_data[b * length + token] = rank * slots + slot;
        if (slot < shared) {
          const int64_t place = (b * group_size + rank) * shared + slot;
          if (slot < row.split[rank]) kv_ids_data[place] = row.document_numbers[token];
          kv_positions_data[place] = static_cast<int32_t>(token);
        }
        if (rank != group_rank) continue;
        const int64_t place = b * slots + slot;
        indices_data[place] = token;
        own_ids_data[place] = ids_data[b * length + token];
        positions_data[place] = static_cast<int32_t>(token);
        document_positions_data[place] = row.document_positions[token];
      }
    }
    int64_t* next = kv_order_data + b * group_size * shared;
    for (const int64_t token : row.split_tokens) {
      const int64_t slot = slot_of_data[b * length + token];
      *next++ = slot / slots * shared + slot % slots;
    }
    for (int64_t rank = 0; rank < group_size; ++rank) {
      for (int64_t slot = row.split[rank]; slot < shared; ++slot) *next++ = rank * shared + slot;
    }
  }
  return {indices, own_ids, positions,   document_positions, kv_ids, kv_positions, kv_order,
          slot_of, shared,  local_start, documents_are_runs};
}

}  // namespace

ContextLayout context_layout(const Tensor& segment_ids, int64_t group_rank, int64_t group_size,
                             const ContextLayoutOptions& options) {
  static const auto op = find_op<decltype(lay_out)>("selfattn::context_layout");
  const auto [indices, ids, positions, document_positions, kv_ids, kv_positions, kv_order, slots, shared, local_start,
              are_runs] = op.call(segment_ids, group_rank, group_size, options.balance(), options.bucket());
  return {.indices = indices,
          .segment_ids = ids,
          .positions = positions,
          .document_positions = document_positions,
          .kv_segment_ids = kv_ids,
          .kv_positions = kv_positions,
          .kv_order = kv_order,
          .slots = slots,
          .shared = shared,
          .local_start = local_start,
          .documents_are_runs = are_runs};
}

}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, CompositeImplicitAutograd, m) {
  using namespace selfattn;
  m.impl("context_layout", TORCH_FN(lay_out));
}
