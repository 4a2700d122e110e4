#include "distributed/context_parallel.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <selfattn/context_parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "common/token_order.h"
#include "distributed/context_parallel_op.h"
#include "distributed/context_part.h"

// Every collective is started before the local part, or before the next group of heads, and waited for behind it: on
// CUDA it then runs beside those kernels.

namespace selfattn {
namespace {

using at::Tensor;

/// What a sum over ranks moves at a time, at the least: smaller ones are far from a link's speed.
constexpr int64_t kBytesOfSum = int64_t{4} << 20;
constexpr int64_t kMostGroupsOfHeads = 4;

// ---------------------------------------------------------------- shapes

/// (B, n * s, ...) -> (n, B, s, ...)
Tensor by_rank(const Tensor& rows, int64_t ranks) { return rows.unflatten(1, {ranks, -1}).transpose(0, 1); }

/// (n, B, s, ...) -> (B, n * s, ...)
Tensor as_rows(const Tensor& by_rank) { return by_rank.transpose(0, 1).flatten(1, 2); }

/// (B, s, H, D) -> (n, B, s, H / n * D)
Tensor heads_by_rank(const Tensor& tokens, int64_t ranks) {
  return tokens.unflatten(2, {ranks, -1}).permute({2, 0, 1, 3, 4}).flatten(3);
}

/// (n, B, s, H / n * D) -> (B, s, H, D)
Tensor join_heads(const Tensor& by_rank, int64_t width) {
  return by_rank.unflatten(3, {-1, width}).permute({1, 2, 0, 3, 4}).flatten(2, 3);
}

/// (n, B, s, F) -> (n, B, s, heads, width) each.
std::vector<Tensor> split_features(const Tensor& packed, std::initializer_list<std::pair<int64_t, int64_t>> shapes) {
  std::vector<Tensor> tensors;
  int64_t begin = 0;
  for (const auto& [heads, width] : shapes) {
    tensors.push_back(packed.narrow(-1, begin, heads * width).unflatten(-1, {heads, width}));
    begin += heads * width;
  }
  return tensors;
}

// ---------------------------------------------------------------- the local part

AttentionProblem narrow_tokens(const AttentionProblem& own, int64_t begin, int64_t end) {
  AttentionProblem part = own;
  for (Tensor* tensor : {&part.query, &part.key, &part.value}) *tensor = tensor->narrow(1, begin, end - begin);
  return part;
}

/// Ids of the shared slots of this rank, masked but for split documents.
Tensor own_shared_ids(const ContextProblem& problem) {
  return problem.kv_ids.narrow(1, problem.group.rank() * problem.shared, problem.shared);
}

AttentionProblem local_part(const ContextProblem& problem) {
  const int64_t begin = problem.local_start, shared = problem.shared, end = problem.own.query.size(1);
  AttentionProblem part = narrow_tokens(problem.own, begin, end);
  Tensor ids = problem.own.query_segment_ids->narrow(1, begin, end - begin);
  if (begin < shared) {
    const Tensor is_split = own_shared_ids(problem).narrow(1, begin, shared - begin) >= 0;
    const Tensor masked = ids.narrow(1, 0, shared - begin).masked_fill(is_split, -1);
    ids = at::cat({masked, ids.narrow(1, shared - begin, end - shared)}, 1);
  }
  part.query_segment_ids = part.key_segment_ids = ids.contiguous();
  part.query_positions = part.key_positions =
      problem.needs_positions()
          ? OptionalTensor(problem.own.query_positions->narrow(1, begin, end - begin).contiguous())
          : std::nullopt;
  return part;
}

/// The results of both parts for the tokens of this rank, of which at most one is not 0 for a token.
Tensor join_parts(const ContextProblem& problem, const Tensor& local, const Tensor& shared) {
  if (!problem.has_local_part()) return shared.contiguous();
  if (!problem.has_shared_part()) return local.contiguous();
  const int64_t begin = problem.local_start, in_both = problem.shared - begin;
  return at::cat({shared.narrow(1, 0, begin), shared.narrow(1, begin, in_both) + local.narrow(1, 0, in_both),
                  local.narrow(1, in_both, local.size(1) - in_both)},
                 1);
}

// ---------------------------------------------------------------- the shared part, by keys

/// Keys and values of the shared slots of this rank as one tensor, (B, s, NKV, DQK + DV).
Tensor start_gathering_keys(const ContextProblem& problem) {
  const AttentionProblem part = narrow_tokens(problem.own, 0, problem.shared);
  return problem.group.start_gather(at::cat({part.key, part.value}, -1));
}

/// The queries of this rank, and the keys of all.
AttentionProblem shared_part_by_keys(const ContextProblem& problem, const Tensor& gathered) {
  const int64_t width = problem.own.key.size(3), value_width = problem.own.value.size(3);
  AttentionProblem part = narrow_tokens(problem.own, 0, problem.shared);
  const Tensor rows = as_rows(gathered);
  part.key = rows.narrow(-1, 0, width), part.value = rows.narrow(-1, width, value_width);
  part.query_segment_ids = own_shared_ids(problem).contiguous();
  part.key_segment_ids = problem.kv_ids;
  if (problem.own.has_positions()) {
    part.query_positions = problem.own.query_positions->narrow(1, 0, problem.shared).contiguous();
    part.key_positions = problem.kv_positions;
  }
  return part;
}

/// How many groups of key heads are computed one after another: sums of one group run beside the next.
int64_t groups_of_heads(const AttentionProblem& part) {
  const int64_t key_heads = part.key.size(2);
  const int64_t bytes = (part.key.numel() + part.value.numel()) * part.key.element_size();
  const int64_t most = std::clamp<int64_t>(bytes / kBytesOfSum, 1, kMostGroupsOfHeads);
  for (int64_t groups = std::min(most, key_heads); groups > 1; --groups) {
    if (key_heads % groups == 0) return groups;
  }
  return 1;
}

/// Group `i` of `groups` groups of key heads, with its query heads.
AttentionProblem narrow_heads(const AttentionProblem& part, int64_t i, int64_t groups) {
  const auto narrow = [&](const Tensor& tensor) { return tensor.chunk(groups, 2)[i]; };
  AttentionProblem group = part;
  group.query = narrow(part.query), group.key = narrow(part.key), group.value = narrow(part.value);
  if (part.sinks) group.sinks = part.sinks->chunk(groups, 0)[i];
  return group;
}

PartGradients backward_by_keys(const ContextProblem& problem, const AttentionProblem& part,
                               const AttentionGradients& gradients) {
  const int64_t ranks = problem.group.size(), groups = groups_of_heads(part);
  const auto dtype = part.key.scalar_type();
  // One addition rounds once; sums of more are kept in float32.
  const auto sum_dtype = ranks > 2 && dtype != at::kDouble ? at::kFloat : dtype;
  std::vector<Tensor> queries, sums, sinks;
  for (int64_t i = 0; i < groups; ++i) {
    const AttentionGradients of_group{.grad_out = gradients.grad_out.chunk(groups, 2)[i],
                                      .out = gradients.out.chunk(groups, 2)[i],
                                      .lse = gradients.lse.chunk(groups, 1)[i]};
    const PartGradients own = attend_part_backward(narrow_heads(part, i, groups), problem.backend, of_group);
    const Tensor packed = at::cat({own.key.to(sum_dtype), own.value.to(sum_dtype)}, -1);
    sums.push_back(problem.group.start_sum(by_rank(packed, ranks).contiguous()));
    queries.push_back(own.query);
    if (part.sinks) sinks.push_back(own.sinks);
  }
  for (Tensor& sum : sums) sum = RankGroup::finish(sum).squeeze(0).to(dtype);
  const Tensor packed = sums.size() == 1 ? sums[0] : at::cat(sums, 2);
  const int64_t width = part.key.size(3);
  return {queries.size() == 1 ? queries[0] : at::cat(queries, 2), packed.narrow(-1, 0, width),
          packed.narrow(-1, width, part.value.size(3)), part.sinks ? at::cat(sinks) : Tensor()};
}

// ---------------------------------------------------------------- the shared part, by heads

struct HeadsOfRank {
  int64_t query, key, width, value_width;

  explicit HeadsOfRank(const ContextProblem& problem)
      : query(problem.query_heads_of_rank().expect_int()),
        key(problem.key_heads_of_rank().expect_int()),
        width(problem.own.query.size(3)),
        value_width(problem.own.value.size(3)) {}
};

/// Of fewer key heads than ranks each goes to several.
Tensor repeat_heads(const ContextProblem& problem, const Tensor& keys) {
  const int64_t times = problem.group.size() / keys.size(2);
  return times > 1 ? keys.repeat_interleave(times, 2) : keys;
}

Tensor sum_repeated_heads(const Tensor& gradient, int64_t heads) {
  return gradient.size(2) == heads ? gradient : gradient.unflatten(2, {heads, -1}).sum(3);
}

Tensor start_exchanging_heads(const ContextProblem& problem) {
  const AttentionProblem part = narrow_tokens(problem.own, 0, problem.shared);
  const int64_t ranks = problem.group.size();
  return problem.group.start_exchange(
      at::cat({heads_by_rank(part.query, ranks), heads_by_rank(repeat_heads(problem, part.key), ranks),
               heads_by_rank(repeat_heads(problem, part.value), ranks)},
              -1));
}

/// The order of shared tokens in which their indices say what their positions say: split documents by position, side by
/// side, and the rest behind (flat_order). Undefined where positions stay what is compared, since a window counts what
/// lay between, or nothing is.
Tensor order_of_rows(const ContextProblem& problem) {
  if (!problem.own.has_positions() || problem.needs_positions()) return {};
  const Tensor last = at::full({}, std::numeric_limits<int32_t>::max(), problem.kv_ids.options());
  const Tensor by_position =
      at::where(problem.kv_ids < 0, last, *problem.kv_positions).argsort(int64_t{1}, /*descending=*/false);
  return flat_order(by_position);
}

/// All shared tokens in that order, and the heads of this rank.
AttentionProblem shared_part_by_heads(const ContextProblem& problem, const Tensor& exchanged, const Tensor& order) {
  const HeadsOfRank heads(problem);
  const auto tensors =
      split_features(exchanged, {{heads.query, heads.width}, {heads.key, heads.width}, {heads.key, heads.value_width}});
  AttentionProblem part = problem.own;
  part.query = reorder(as_rows(tensors[0]), order);
  part.key = reorder(as_rows(tensors[1]), order);
  part.value = reorder(as_rows(tensors[2]), order);
  part.query_segment_ids = part.key_segment_ids = reorder(problem.kv_ids, order);
  part.query_positions = part.key_positions = order.defined() ? std::nullopt : problem.kv_positions;
  if (part.sinks) part.sinks = part.sinks->narrow(0, problem.group.rank() * heads.query, heads.query);
  return part;
}

/// (B, n * s, heads of this rank, D) -> (B, s, NH, D)
Tensor exchange_back(const RankGroup& group, const Tensor& rows) {
  const Tensor sent = by_rank(rows, group.size()).flatten(3).contiguous();
  return join_heads(RankGroup::finish(group.start_exchange(sent)), rows.size(3));
}

PartGradients backward_by_heads(const ContextProblem& problem, const AttentionProblem& part,
                                const AttentionGradients& gradients, const Tensor& order) {
  const HeadsOfRank heads(problem);
  const int64_t ranks = problem.group.size(), key_heads = problem.own.key.size(2);
  const PartGradients own = attend_part_backward(part, problem.backend, gradients);
  const Tensor inverse = inverse_of(order);
  std::vector<Tensor> sent;
  for (const Tensor* gradient : {&own.query, &own.key, &own.value}) {
    sent.push_back(by_rank(reorder(*gradient, inverse), ranks).flatten(3));
  }
  const Tensor received = RankGroup::finish(problem.group.start_exchange(at::cat(sent, -1)));
  const auto tensors =
      split_features(received, {{heads.query, heads.width}, {heads.key, heads.width}, {heads.key, heads.value_width}});
  const auto join = [](const Tensor& of_ranks) { return of_ranks.permute({1, 2, 0, 3, 4}).flatten(2, 3); };
  PartGradients result{join(tensors[0]), sum_repeated_heads(join(tensors[1]), key_heads),
                       sum_repeated_heads(join(tensors[2]), key_heads), Tensor()};
  if (part.sinks) {
    result.sinks = at::zeros_like(*problem.own.sinks);
    result.sinks.narrow(0, problem.group.rank() * heads.query, heads.query).copy_(own.sinks);
  }
  return result;
}

}  // namespace

// ---------------------------------------------------------------- both parts

ContextResults context_parallel_forward(const ContextProblem& problem) {
  const bool by_heads = problem.method == ContextMethod::kHeads;
  Tensor started, local, shared;
  if (problem.has_shared_part()) {
    problem.group.rank();  // a group of another size is refused before the first collective
    started = by_heads ? start_exchanging_heads(problem) : start_gathering_keys(problem);
  }
  const auto options = problem.own.query.options().dtype(at::kFloat);
  Tensor lse = at::empty({problem.own.query.size(0), problem.own.query.size(2), 0}, options), shared_lse = lse.clone();
  std::vector<Tensor> exchanged;
  if (problem.has_local_part()) std::tie(local, lse) = attend_part(local_part(problem), problem.backend);
  if (problem.has_shared_part()) {
    const Tensor received = RankGroup::finish(started);
    if (by_heads) {
      const Tensor order = order_of_rows(problem);
      std::tie(shared, shared_lse) = attend_part(shared_part_by_heads(problem, received, order), problem.backend);
      exchanged = {received, shared};
      shared = exchange_back(problem.group, reorder(shared, inverse_of(order)));
    } else {
      std::tie(shared, shared_lse) = attend_part(shared_part_by_keys(problem, received), problem.backend);
    }
  }
  return {join_parts(problem, local, shared), lse, shared_lse, exchanged};
}

ContextGradients context_parallel_backward(const ContextProblem& problem, const Tensor& grad_out, const Tensor& out,
                                           const Tensor& lse, const Tensor& shared_lse, at::TensorList exchanged) {
  const bool by_heads = problem.method == ContextMethod::kHeads;
  const int64_t length = problem.own.query.size(1), ranks = problem.group.size();
  const Tensor shared_grad_out = grad_out.narrow(1, 0, problem.shared);
  Tensor started;
  if (problem.has_shared_part()) {
    problem.group.rank();
    started = by_heads ? problem.group.start_exchange(heads_by_rank(shared_grad_out, ranks).contiguous())
                       : start_gathering_keys(problem);
  }
  PartGradients local, shared;
  if (problem.has_local_part()) {
    const int64_t begin = problem.local_start;
    local = attend_part_backward(local_part(problem), problem.backend,
                                 {.grad_out = grad_out.narrow(1, begin, length - begin),
                                  .out = out.narrow(1, begin, length - begin),
                                  .lse = lse});
  }
  if (problem.has_shared_part()) {
    const Tensor received = RankGroup::finish(started);
    if (by_heads) {
      const Tensor order = order_of_rows(problem);
      const Tensor grad_rows = reorder(as_rows(received.unflatten(3, {-1, out.size(3)})), order);
      shared = backward_by_heads(problem, shared_part_by_heads(problem, exchanged[0], order),
                                 {.grad_out = grad_rows, .out = exchanged[1], .lse = shared_lse}, order);
    } else {
      shared =
          backward_by_keys(problem, shared_part_by_keys(problem, received),
                           {.grad_out = shared_grad_out, .out = out.narrow(1, 0, problem.shared), .lse = shared_lse});
    }
  }
  Tensor sinks = at::zeros({problem.own.sinks ? problem.own.sinks->size(0) : 0},
                           problem.own.sinks.value_or(problem.own.query).options());
  for (const PartGradients* part : {&local, &shared}) {
    if (part->sinks.defined()) sinks += part->sinks;
  }
  return {join_parts(problem, local.query, shared.query), join_parts(problem, local.key, shared.key),
          join_parts(problem, local.value, shared.value), sinks};
}

namespace {

/// Chooses the method here, where the device is known, as it is not to the operators on meta tensors.
Tensor attend(const ContextCall& call) {
  ContextCall chosen = call;
  if (call.method == "auto") {
    chosen.method = make_context_problem(call).method == ContextMethod::kHeads ? "heads" : "keys";
  }
  return std::get<0>(ContextParallelForward::call(kContextParallelForward, chosen));
}

ContextResults forward(const ContextCall& call) { return context_parallel_forward(make_context_problem(call)); }

ContextGradients backward(const Tensor& grad_out, const Tensor& out, const Tensor& lse, const Tensor& shared_lse,
                          at::TensorList exchanged, const ContextCall& call) {
  const ContextProblem problem = make_context_problem(call);
  check_context_gradients(problem, grad_out, out, lse, shared_lse, exchanged);
  return context_parallel_backward(problem, grad_out, out, lse, shared_lse, exchanged);
}

void register_kernels(torch::Library& m) {
  m.impl("context_parallel_attention_forward", TORCH_FN(ContextParallelForward::from_schema<forward>));
  m.impl("context_parallel_attention_backward", TORCH_FN(ContextParallelBackward::from_schema<backward>));
}

}  // namespace

Tensor context_parallel_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                  const ContextParallelOptions& options) {
  return ContextParallelAttention::call("selfattn::context_parallel_attention",
                                        {.q = q,
                                         .k = k,
                                         .v = v,
                                         .kv_segment_ids = options.kv_segment_ids(),
                                         .kv_positions = options.kv_positions(),
                                         .attention = {.segment_ids = options.segment_ids(),
                                                       .is_causal = options.causal(),
                                                       .qk_scale = options.qk_scale(),
                                                       .window_left = options.window_left(),
                                                       .window_right = options.window_right(),
                                                       .softcap = options.softcap(),
                                                       .sinks = options.sinks(),
                                                       .positions = options.positions()},
                                         .shared = options.shared(),
                                         .group_size = options.group_size(),
                                         .group_name = options.group_name(),
                                         .method = options.method(),
                                         .backend = options.backend(),
                                         .local_start = options.local_start(),
                                         .documents_are_runs = options.documents_are_runs()});
}

}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, CompositeImplicitAutograd, m) {
  using namespace selfattn;
  m.impl("context_parallel_attention", TORCH_FN(ContextParallelAttention::from_schema<attend>));
}
TORCH_LIBRARY_IMPL(selfattn, CPU, m) { selfattn::register_kernels(m); }
TORCH_LIBRARY_IMPL(selfattn, CUDA, m) { selfattn::register_kernels(m); }
