#include "distributed/context_problem.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "common/dense_tensor.h"
#include "segment/segment_ids.h"

namespace selfattn {
namespace {

using at::Tensor;

/// Whether the query and key heads can be spread over so many ranks.
bool heads_fit(const AttentionProblem& own, int64_t ranks) {
  const c10::SymInt key_heads = own.key_heads();
  return own.query_heads() % ranks == 0 && (key_heads % ranks == 0 || ranks % key_heads == 0);
}

void check_heads_fit(const AttentionProblem& own, int64_t ranks, const char* argument, const char* reason) {
  TORCH_CHECK_VALUE(heads_fit(own, ranks), "selfattn: ", reason, " needs a ", argument, " that divides the ",
                    own.query_heads(), " query heads, and divides the ", own.key_heads(),
                    " key heads or is a multiple of them; got ", ranks);
}

/// Where all tokens travel the one that moves fewer bytes in both passes: keys and values are gathered twice and their
/// gradients summed once, whole shards of every rank; of heads a rank receives and gives its share. Beside documents
/// that stay whole keys: layouts even out what ranks do by keys, of which heads would be the same for all.
ContextMethod choose_method(const ContextProblem& problem, int64_t ranks) {
  const AttentionProblem& own = problem.own;
  const bool fits = heads_fit(own, ranks);
  if (problem.shared < own.query_length()) return ContextMethod::kKeys;
  const c10::SymInt keys = 3 * own.key_heads() * ranks;
  const c10::SymInt heads = 2 * (own.query_heads() + std::max(own.key_heads(), c10::SymInt(ranks)));
  return heads < keys && fits ? ContextMethod::kHeads : ContextMethod::kKeys;
}

/// Of a call without a heads group.
ContextMethod parse_method(const ContextCall& call, const ContextProblem& problem) {
  if (call.method == "auto") return choose_method(problem, call.group_size);
  if (call.method == "keys") return ContextMethod::kKeys;
  TORCH_CHECK_VALUE(call.method == "heads", "selfattn: method must be one of auto, heads, keys; got '", call.method,
                    "'");
  check_heads_fit(problem.own, call.group_size, "group_size", "method 'heads'");
  return ContextMethod::kHeads;
}

void take_groups(const ContextCall& call, ContextProblem& problem) {
  const RankGroup group(call.group_name, call.group_size, "group_size");
  const RankGroup heads_group(call.heads_group_name, call.heads_group_size, "heads_group_size");
  if (heads_group.size() > 1) {
    TORCH_CHECK_VALUE(call.method == "auto" || call.method == "keys",
                      "selfattn: method must be auto or keys beside a heads group, heads_group_size ",
                      heads_group.size(), "; got '", call.method, "'");
    check_heads_fit(problem.own, heads_group.size(), "heads_group_size", "a heads group");
  } else {
    problem.method = parse_method(call, problem);
  }
  if (problem.method == ContextMethod::kHeads) {
    problem.heads = group;
  } else {
    problem.heads = heads_group, problem.keys = group;
  }
}

void check_gathered(const Tensor& integers, const char* name, const Tensor& q, const c10::SymInt& length) {
  check_integer_rows(integers, name);
  check_device(integers, name, q.device(), "q");
  TORCH_CHECK_VALUE(integers.sym_size(0) == q.sym_size(0) && integers.sym_size(1) == length, "selfattn: ", name,
                    " must have the shape (B, heads_group_size * group_size * shared) = [", q.sym_size(0), ", ", length,
                    "]; got ", integers.sym_sizes());
}

void check_shape(const Tensor& tensor, const char* name, const Tensor& q, at::ScalarType dtype,
                 const std::vector<c10::SymInt>& shape) {
  check_dense(tensor, name);
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, "selfattn: ", name, " must be ", dtype, "; got ",
                   tensor.scalar_type());
  check_device(tensor, name, q.device(), "q");
  TORCH_CHECK_VALUE(tensor.sym_sizes() == c10::SymIntArrayRef(shape), "selfattn: ", name, " must have the shape ",
                    c10::SymIntArrayRef(shape), "; got ", tensor.sym_sizes());
}

}  // namespace

c10::SymInt ContextProblem::key_heads_of_rank() const {
  return std::max(own.key_heads(), c10::SymInt(heads.size())) / heads.size();
}

int64_t ContextProblem::groups_of_heads() const {
  // They hide half of what travels; a third group would hide a sixth more.
  constexpr int64_t kGroups = 2;
  // Over the NVLink of two H200 smaller groups cost more than they hide (benchmarks/results/scale_tuning.txt):
  // collectives take SMs and memory from the attention that they run beside.
  constexpr int64_t kBytesOfTransfer = int64_t{64} << 20;
  // A group's attention ends with SMs that wait for the last tiles, of 128 rows, on average for half a tile: that is
  // what another group costs. (Less where the last tiles are the shortest.) It is to be no more than what is hidden,
  // and how many tiles there are for an SM plays no part: with more tokens tiles are as much longer as transfers are.
  // An SM of an H200 computes 5 Top/s, while 0.3 TB/s arrive over NVLink.
  constexpr int64_t kRowsOfTile = 128, kOperationsPerByte = 16;

  if (heads.size() * keys.size() == 1) return 1;
  const int64_t queries = heads.size() * shared, others = heads.size() - 1;
  const c10::SymInt element = own.batch() * static_cast<int64_t>(own.query.element_size());
  const c10::SymInt width = own.head_dim() + own.value_head_dim();  // of a query with its out, of a key with its value
  const c10::SymInt query_heads = query_heads_of_rank(), key_heads = key_heads_of_rank();
  // What a rank receives in a forward pass. In a backward pass that, and operations, are about twice as much.
  const c10::SymInt bytes_of_keys = (keys.size() - 1) * queries * key_heads * width * element;
  const c10::SymInt bytes_of_heads = others * shared * (query_heads + key_heads) * width * element;
  const c10::SymInt bytes_of_out = others * shared * query_heads * own.value_head_dim() * element;
  const c10::SymInt smallest = heads.size() == 1  ? bytes_of_keys
                               : keys.size() == 1 ? bytes_of_out
                                                  : std::min(bytes_of_keys, bytes_of_out);
  const int64_t keys_of_query = keys.size() * queries / (own.is_causal ? 2 : 1);
  const c10::SymInt hidden = (bytes_of_keys + bytes_of_heads) / 2 * kOperationsPerByte;
  const c10::SymInt idle = kRowsOfTile / 2 * keys_of_query * 2 * width;
  return key_heads % kGroups == 0 && smallest >= kGroups * kBytesOfTransfer && hidden >= idle ? kGroups : 1;
}

AttentionProblem ContextProblem::narrow_tokens(int64_t begin, int64_t end) const {
  AttentionProblem part = own;
  for (Tensor* tensor : {&part.query, &part.key, &part.value}) *tensor = tensor->narrow(1, begin, end - begin);
  return part;
}

ContextProblem make_context_problem(const ContextCall& call) {
  const Backend backend = parse_backend(call.backend);
  AttentionProblem own = make_attention_problem(call.q, call.k, call.v, call.attention);
  TORCH_CHECK_VALUE(own.query_length() == own.key_length(),
                    "selfattn: q and k must hold the same tokens of a shard; got lengths ", own.query_length(), " and ",
                    own.key_length());
  check_group_size(call.group_size);
  check_group_size(call.heads_group_size, "heads_group_size");
  TORCH_CHECK_VALUE(call.shared >= 0 && call.shared <= own.query_length(),
                    "selfattn: shared must be from 0 to the length of q, ", own.query_length(), "; got ", call.shared);
  TORCH_CHECK_VALUE(call.local_start >= 0 && call.local_start <= call.shared,
                    "selfattn: local_start must be from 0 to shared, ", call.shared, "; got ", call.local_start);
  const c10::SymInt gathered = c10::SymInt(call.heads_group_size * call.group_size) * call.shared;
  check_gathered(call.kv_segment_ids, "kv_segment_ids", call.q, gathered);
  check_gathered(call.kv_positions, "kv_positions", call.q, gathered);
  if (call.kv_order) {
    check_gathered(*call.kv_order, "kv_order", call.q, gathered);
    TORCH_CHECK_TYPE(call.kv_order->scalar_type() == at::kLong, "selfattn: kv_order must be int64; got ",
                     call.kv_order->scalar_type());
  }
  ContextProblem problem{.own = std::move(own),
                         .kv_ids = as_int32(call.kv_segment_ids, "kv_segment_ids"),
                         .kv_order = call.kv_order,
                         .shared = call.shared,
                         .local_start = call.local_start,
                         .documents_are_runs = call.documents_are_runs,
                         .method = ContextMethod::kKeys,
                         .backend = backend};
  problem.own.query_segment_ids = problem.own.key_segment_ids = as_int32(*problem.own.query_segment_ids, "segment_ids");
  if (problem.own.has_positions()) problem.kv_positions = as_int32(call.kv_positions, "kv_positions");
  take_groups(call, problem);
  return problem;
}

void check_context_gradients(const ContextProblem& problem, const Tensor& grad_out, const Tensor& out,
                             const Tensor& lse, const Tensor& shared_lse, at::TensorList exchanged) {
  const auto [empty_out, empty_lse, empty_shared_lse, empty_exchanged] = empty_context_results(problem, at::kMeta);
  const auto check_like = [&](const Tensor& tensor, const char* name, const Tensor& expected) {
    check_shape(tensor, name, problem.own.query, expected.scalar_type(), expected.sym_sizes().vec());
  };
  check_like(grad_out, "grad_out", empty_out);
  check_like(out, "out", empty_out);
  check_like(lse, "lse", empty_lse);
  check_like(shared_lse, "shared_lse", empty_shared_lse);
  TORCH_CHECK_VALUE(exchanged.size() == empty_exchanged.size(), "selfattn: exchanged must hold ",
                    empty_exchanged.size(), " tensors; got ", exchanged.size());
  for (size_t i = 0; i < exchanged.size(); ++i) check_like(exchanged[i], "exchanged", empty_exchanged[i]);
}

ContextResults empty_context_results(const ContextProblem& problem, at::Device device) {
  const AttentionProblem& own = problem.own;
  const c10::SymInt batch = own.batch(), heads = own.query_heads(), width = own.value_head_dim();
  const auto options = own.query.options().device(device);
  const auto of_lse = options.dtype(at::kFloat);
  const Tensor out = at::empty_symint({batch, problem.length(), heads, width}, options);
  const Tensor lse = at::empty_symint({batch, heads, problem.length() - problem.local_start}, of_lse);
  const c10::SymInt ranks = problem.heads.size(), tokens = ranks * problem.shared;
  if (ranks == 1 || !problem.has_shared_part()) {
    return {out, lse, at::empty_symint({batch, heads, problem.shared}, of_lse), {}};
  }
  const c10::SymInt own_heads = problem.query_heads_of_rank(), key_heads = problem.key_heads_of_rank();
  const c10::SymInt features = own_heads * own.head_dim() + key_heads * (own.head_dim() + width);
  const int64_t groups = problem.groups_of_heads();
  std::vector<Tensor> exchanged;
  for (int64_t i = 0; i < groups; ++i) {
    exchanged.push_back(at::empty_symint({batch, tokens, features / groups}, options));
    exchanged.push_back(at::empty_symint({batch, tokens, own_heads / groups, width}, options));
  }
  return {out, lse, at::empty_symint({batch, own_heads, tokens}, of_lse), exchanged};
}

}  // namespace selfattn
