#include "distributed/shared_part.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <limits>

#include "common/token_order.h"

namespace selfattn {
namespace {

using at::Tensor;

/// What a collective moves at a time, at the least: smaller ones are far from a link's speed.
constexpr int64_t kBytesOfTransfer = int64_t{4} << 20;
constexpr int64_t kMostGroupsOfHeads = 4;

// ---------------------------------------------------------------- shapes

/// (B, n * s, ...) -> (n, B, s, ...)
Tensor by_rank(const Tensor& rows, int64_t ranks) { return rows.unflatten(1, {ranks, -1}).transpose(0, 1); }

/// (n, B, s, ...) -> (B, n * s, ...)
Tensor as_rows(const Tensor& by_rank) { return by_rank.transpose(0, 1).flatten(1, 2); }

/// (B, s, H, D) -> (n, B, s, H / n, D)
Tensor heads_by_rank(const Tensor& tokens, int64_t ranks) {
  return tokens.unflatten(2, {ranks, -1}).permute({2, 0, 1, 3, 4});
}

/// (n, B, s, H / n, D) -> (B, s, H, D)
Tensor join_heads(const Tensor& by_rank) { return by_rank.permute({1, 2, 0, 3, 4}).flatten(2, 3); }

// ---------------------------------------------------------------- the heads step

/// What a rank of the heads group computes of one of q, k and v.
struct HeadsOfRank {
  int64_t count, width;
};

HeadsOfRank query_heads(const ContextProblem& problem, int64_t width) {
  return {problem.query_heads_of_rank().expect_int(), width};
}

/// Of q, k and v.
std::vector<HeadsOfRank> heads_of_rank(const ContextProblem& problem) {
  const int64_t key_heads = problem.key_heads_of_rank().expect_int(), width = problem.own.query.size(3);
  return {query_heads(problem, width), {key_heads, width}, {key_heads, problem.own.value.size(3)}};
}

/// (h, B, s, heads, D) each, of which [i] goes to rank i, as one tensor.
Tensor start_exchange(const RankGroup& group, std::vector<Tensor> tensors) {
  for (Tensor& tensor : tensors) tensor = tensor.flatten(3);
  return group.start_exchange(at::cat(tensors, -1));
}

/// (h, B, s, F) -> (h, B, s, heads, D) each.
std::vector<Tensor> split_features(const Tensor& packed, const std::vector<HeadsOfRank>& heads) {
  std::vector<Tensor> tensors;
  int64_t begin = 0;
  for (const auto& [count, width] : heads) {
    tensors.push_back(packed.narrow(-1, begin, count * width).unflatten(-1, {count, width}));
    begin += count * width;
  }
  return tensors;
}

/// (B, h * s, heads of this rank, D) each -> (B, s, all heads, D) each.
std::vector<Tensor> exchange_back(const RankGroup& group, std::vector<Tensor> tensors,
                                  const std::vector<HeadsOfRank>& heads) {
  for (Tensor& tensor : tensors) tensor = by_rank(tensor, group.size());
  std::vector<Tensor> received = split_features(RankGroup::finish(start_exchange(group, std::move(tensors))), heads);
  for (Tensor& tensor : received) tensor = join_heads(tensor);
  return received;
}

/// Of fewer key heads than ranks each goes to several.
Tensor repeat_heads(const ContextProblem& problem, const Tensor& keys) {
  const int64_t times = problem.heads.size() / keys.size(2);
  return times > 1 ? keys.repeat_interleave(times, 2) : keys;
}

Tensor sum_repeated_heads(const Tensor& gradient, int64_t heads) {
  return gradient.size(2) == heads ? gradient : gradient.unflatten(2, {heads, -1}).sum(3);
}

/// The shared tokens of the heads group, and the heads of this rank.
AttentionProblem part_of_heads_group(const ContextProblem& problem, const Tensor& exchanged) {
  const int64_t ranks = problem.heads.size(), tokens = ranks * problem.shared;
  AttentionProblem part = problem.narrow_tokens(0, problem.shared);
  if (ranks > 1) {
    const auto heads = heads_of_rank(problem);
    const auto tensors = split_features(exchanged, heads);
    part.query = as_rows(tensors[0]), part.key = as_rows(tensors[1]), part.value = as_rows(tensors[2]);
    if (part.sinks) part.sinks = part.sinks->narrow(0, problem.heads.rank() * heads[0].count, heads[0].count);
  }
  const auto of_group = [&](const Tensor& of_all) {
    return of_all.narrow(1, problem.keys.rank() * tokens, tokens).contiguous();
  };
  part.query_segment_ids = part.key_segment_ids = of_group(problem.kv_ids);
  if (problem.kv_positions) part.query_positions = part.key_positions = of_group(*problem.kv_positions);
  return part;
}

/// The order of shared tokens in which their indices say what their positions say: each split document by position, and
/// the rest behind (flat_order). Undefined where positions stay what is compared, since queries are some of
/// the tokens or a window counts what lay between, or nothing is.
Tensor order_of_rows(const ContextProblem& problem) {
  if (problem.heads.size() == 1 || problem.keys.size() > 1) return {};
  if (!problem.own.has_positions() || problem.needs_positions()) return {};
  if (problem.kv_order) return flat_order(*problem.kv_order);
  const Tensor last = at::full({}, std::numeric_limits<int32_t>::max(), problem.kv_ids.options());
  const Tensor by_position =
      at::where(problem.kv_ids < 0, last, *problem.kv_positions).argsort(int64_t{1}, /*descending=*/false);
  return flat_order(by_position);
}

void reorder_tokens(AttentionProblem& part, const Tensor& order) {
  if (!order.defined()) return;
  for (Tensor* tensor : {&part.query, &part.key, &part.value}) *tensor = reorder(*tensor, order);
  part.query_segment_ids = part.key_segment_ids = reorder(*part.query_segment_ids, order);
  part.query_positions = part.key_positions = std::nullopt;
}

// ---------------------------------------------------------------- the keys step

/// How many groups of key heads are gathered, and computed, one after another.
int64_t groups_of_heads(const ContextProblem& problem, const AttentionProblem& part) {
  const int64_t key_heads = part.key.size(2);
  const int64_t bytes = (part.key.numel() + part.value.numel()) * part.key.element_size() * problem.keys.size();
  const int64_t most = std::clamp<int64_t>(bytes / kBytesOfTransfer, 1, kMostGroupsOfHeads);
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

/// Keys and values of a heads group, each group of heads as one tensor, (B, h * s, NKV / groups, DQK + DV).
std::vector<Tensor> start_gathering_keys(const ContextProblem& problem, const AttentionProblem& part, int64_t groups) {
  std::vector<Tensor> started;
  for (int64_t i = 0; i < groups; ++i) {
    const AttentionProblem group = narrow_heads(part, i, groups);
    started.push_back(problem.keys.start_gather(at::cat({group.key, group.value}, -1)));
  }
  return started;
}

/// Of the keys of all ranks, where the call gives it.
Tensor order_of_keys(const ContextProblem& problem) {
  return problem.kv_order ? flat_order(*problem.kv_order) : Tensor();
}

/// The part with the ids and positions of all ranks' keys in an order, the same for every group of heads.
AttentionProblem beside_keys_of_all(const ContextProblem& problem, AttentionProblem part, const Tensor& order) {
  part.key_segment_ids = reorder(problem.kv_ids, order);
  if (!problem.kv_positions) return part;
  part.key_positions = reorder(*problem.kv_positions, order);
  part.is_in_order = order.defined() && problem.heads.size() == 1;  // else queries are those of several ranks
  return part;
}

/// In order, where it is known: then a query's keys lie side by side.
void take_keys_of_all(AttentionProblem& group, const Tensor& gathered, const Tensor& order) {
  const int64_t width = group.key.size(3), value_width = group.value.size(3);
  const Tensor rows = reorder(as_rows(gathered), order);
  group.key = rows.narrow(-1, 0, width), group.value = rows.narrow(-1, width, value_width);
}

Tensor join(const std::vector<Tensor>& groups, int64_t dim) {
  return groups.size() == 1 ? groups[0] : at::cat(groups, dim);
}

/// Of the queries of the heads group, whose part has no other keys yet.
AttentionResults attend_to_keys(const ContextProblem& problem, const AttentionProblem& part,
                                const std::vector<Tensor>& gathering) {
  if (problem.keys.size() == 1) return attend_part(part, problem.backend);
  const Tensor order = order_of_keys(problem);
  const AttentionProblem whole = beside_keys_of_all(problem, part, order);
  const auto groups = static_cast<int64_t>(gathering.size());
  std::vector<Tensor> outs, lses;
  for (int64_t i = 0; i < groups; ++i) {
    AttentionProblem group = narrow_heads(whole, i, groups);
    take_keys_of_all(group, RankGroup::finish(gathering[i]), order);
    const auto [out, lse] = attend_part(group, problem.backend);
    outs.push_back(out), lses.push_back(lse);
  }
  return {join(outs, 2), join(lses, 1)};
}

/// Likewise; gradients of keys are summed over the keys group.
PartGradients attend_to_keys_backward(const ContextProblem& problem, const AttentionProblem& part,
                                      const AttentionGradients& gradients, const std::vector<Tensor>& gathering) {
  const int64_t ranks = problem.keys.size();
  if (ranks == 1) return attend_part_backward(part, problem.backend, gradients);
  const Tensor order = order_of_keys(problem), as_gathered = inverse_of(order);
  const AttentionProblem whole = beside_keys_of_all(problem, part, order);
  const auto groups = static_cast<int64_t>(gathering.size());
  const auto dtype = part.key.scalar_type();
  // One addition rounds once; sums of more are kept in float32.
  const auto sum_dtype = ranks > 2 && dtype != at::kDouble ? at::kFloat : dtype;
  std::vector<Tensor> queries, sums, sinks;
  for (int64_t i = 0; i < groups; ++i) {
    AttentionProblem group = narrow_heads(whole, i, groups);
    take_keys_of_all(group, RankGroup::finish(gathering[i]), order);
    const AttentionGradients of_group{.grad_out = gradients.grad_out.chunk(groups, 2)[i],
                                      .out = gradients.out.chunk(groups, 2)[i],
                                      .lse = gradients.lse.chunk(groups, 1)[i]};
    const PartGradients own = attend_part_backward(group, problem.backend, of_group);
    const Tensor packed = reorder(at::cat({own.key.to(sum_dtype), own.value.to(sum_dtype)}, -1), as_gathered);
    sums.push_back(problem.keys.start_sum(by_rank(packed, ranks).contiguous()));
    queries.push_back(own.query);
    if (part.sinks) sinks.push_back(own.sinks);
  }
  for (Tensor& sum : sums) sum = RankGroup::finish(sum).squeeze(0).to(dtype);
  const Tensor packed = join(sums, 2);
  const int64_t width = part.key.size(3);
  return {join(queries, 2), packed.narrow(-1, 0, width), packed.narrow(-1, width, part.value.size(3)),
          part.sinks ? join(sinks, 0) : Tensor()};
}

}  // namespace

SharedTransfers start_shared_forward(const ContextProblem& problem) {
  problem.rank();  // groups of other sizes are refused
  SharedTransfers started;
  const int64_t ranks = problem.heads.size();
  if (ranks > 1) {
    const AttentionProblem own = problem.narrow_tokens(0, problem.shared);
    started.heads = start_exchange(
        problem.heads, {heads_by_rank(own.query, ranks), heads_by_rank(repeat_heads(problem, own.key), ranks),
                        heads_by_rank(repeat_heads(problem, own.value), ranks)});
  }
  if (problem.keys.size() > 1) {
    if (ranks > 1) RankGroup::finish(started.heads);
    const AttentionProblem part = part_of_heads_group(problem, started.heads);
    // Where no rank has a local part, which all keys could travel beside.
    const bool in_groups = problem.shared == problem.own.query.size(1);
    started.keys = start_gathering_keys(problem, part, in_groups ? groups_of_heads(problem, part) : 1);
  }
  return started;
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> finish_shared_forward(const ContextProblem& problem,
                                                                      const SharedTransfers& started) {
  const bool exchanges = problem.heads.size() > 1;
  const Tensor exchanged = exchanges ? RankGroup::finish(started.heads) : Tensor();
  const Tensor order = order_of_rows(problem);
  AttentionProblem part = part_of_heads_group(problem, exchanged);
  reorder_tokens(part, order);
  const auto [out, lse] = attend_to_keys(problem, part, started.keys);
  if (!exchanges) return {out, lse, {}};
  const auto back =
      exchange_back(problem.heads, {reorder(out, inverse_of(order))}, {query_heads(problem, out.size(3))});
  return {back[0], lse, {exchanged, out}};
}

SharedTransfers start_shared_backward(const ContextProblem& problem, const Tensor& grad_out, at::TensorList exchanged) {
  problem.rank();
  SharedTransfers started;
  const bool exchanges = problem.heads.size() > 1;
  if (exchanges) started.heads = start_exchange(problem.heads, {heads_by_rank(grad_out, problem.heads.size())});
  if (problem.keys.size() > 1) {
    const AttentionProblem part = part_of_heads_group(problem, exchanges ? exchanged[0] : Tensor());
    started.keys = start_gathering_keys(problem, part, groups_of_heads(problem, part));
  }
  return started;
}

PartGradients finish_shared_backward(const ContextProblem& problem, const SharedTransfers& started,
                                     AttentionGradients gradients, at::TensorList exchanged) {
  if (problem.heads.size() == 1) {
    return attend_to_keys_backward(problem, part_of_heads_group(problem, {}), gradients, started.keys);
  }
  const Tensor order = order_of_rows(problem), inverse = inverse_of(order);
  const auto heads_of_grad = query_heads(problem, gradients.grad_out.size(3));
  gradients.grad_out = reorder(as_rows(split_features(RankGroup::finish(started.heads), {heads_of_grad})[0]), order);
  gradients.out = exchanged[1];
  AttentionProblem part = part_of_heads_group(problem, exchanged[0]);
  reorder_tokens(part, order);
  const PartGradients own = attend_to_keys_backward(problem, part, gradients, started.keys);

  const auto heads = heads_of_rank(problem);
  const auto back = exchange_back(
      problem.heads, {reorder(own.query, inverse), reorder(own.key, inverse), reorder(own.value, inverse)}, heads);
  const int64_t key_heads = problem.own.key.size(2);
  PartGradients result{back[0], sum_repeated_heads(back[1], key_heads), sum_repeated_heads(back[2], key_heads),
                       Tensor()};
  if (problem.own.sinks) {
    result.sinks = at::zeros_like(*problem.own.sinks);
    result.sinks.narrow(0, problem.heads.rank() * heads[0].count, heads[0].count).copy_(own.sinks);
  }
  return result;
}

}  // namespace selfattn
