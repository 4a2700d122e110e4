#include "distributed/shared_part.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <limits>
#include <utility>

#include "distributed/packed_tokens.h"

namespace selfattn {
namespace {

using at::Tensor;

// ---------------------------------------------------------------- heads

/// What a group of heads has of one of q, k and v.
struct HeadsOfGroup {
  int64_t count, width;
  int64_t features() const { return count * width; }
};

HeadsOfGroup query_heads(const ContextProblem& problem, int64_t width, int64_t groups) {
  return {problem.query_heads_of_rank().expect_int() / groups, width};
}

/// Of q, k and v.
std::vector<HeadsOfGroup> heads_of_group(const ContextProblem& problem, int64_t groups) {
  const int64_t key_heads = problem.key_heads_of_rank().expect_int() / groups, width = problem.own.query.size(3);
  return {query_heads(problem, width, groups), {key_heads, width}, {key_heads, problem.own.value.size(3)}};
}

/// The sinks of group `i` of this rank, or their gradients, among those of all heads. A view.
Tensor sinks_of_group(const ContextProblem& problem, const Tensor& sinks, int64_t i, int64_t groups) {
  const int64_t count = sinks.size(0) / (problem.heads.size() * groups);
  return sinks.narrow(0, (problem.heads.rank() * groups + i) * count, count);
}

/// The heads of group `i` of every rank, as they travel: (B, s, H, D) -> (h, B, s, H / h / groups * D). A view, where
/// heads lie side by side.
Tensor heads_by_rank(const Tensor& tokens, int64_t ranks, int64_t i, int64_t groups) {
  return tokens.unflatten(2, {ranks, groups, -1}).select(3, i).permute({2, 0, 1, 3, 4}).flatten(3);
}

/// (..., F) -> (..., heads, D) each, views.
std::vector<Tensor> split_features(const Tensor& packed, const std::vector<HeadsOfGroup>& heads) {
  std::vector<Tensor> tensors;
  int64_t begin = 0;
  for (const HeadsOfGroup& of_one : heads) {
    tensors.push_back(packed.narrow(-1, begin, of_one.features()).unflatten(-1, {of_one.count, of_one.width}));
    begin += of_one.features();
  }
  return tensors;
}

/// Of fewer key heads than ranks each goes to several.
Tensor repeat_heads(const ContextProblem& problem, const Tensor& keys) {
  const int64_t times = problem.heads.size() / keys.size(2);
  return times > 1 ? keys.repeat_interleave(times, 2) : keys;
}

Tensor sum_repeated_heads(const Tensor& gradient, int64_t heads) {
  return gradient.size(2) == heads ? gradient : gradient.unflatten(2, {heads, -1}).sum(3);
}

Tensor join(const std::vector<Tensor>& groups, int64_t dim) {
  return groups.size() == 1 ? groups[0] : at::cat(groups, dim);
}

// ---------------------------------------------------------------- tokens

/// In which order a heads group takes its tokens where no keys travel behind it: such that their indices say what their
/// positions say, each split document by position, and the rest behind. Undefined where positions stay what is
/// compared, since a window counts what lay between, or nothing is.
Tensor order_of_heads_step(const ContextProblem& problem) {
  if (problem.heads.size() == 1 || problem.keys.size() > 1) return {};
  if (!problem.own.has_positions() || problem.needs_positions()) return {};
  if (problem.kv_order) return *problem.kv_order;
  const Tensor last = at::full({}, std::numeric_limits<int32_t>::max(), problem.kv_ids.options());
  return at::where(problem.kv_ids < 0, last, *problem.kv_positions).argsort(int64_t{1}, /*descending=*/false);
}

/// In which order a keys group takes its keys, where it is known: then a query's keys lie side by side.
Tensor order_of_keys_step(const ContextProblem& problem) {
  return problem.keys.size() > 1 && problem.kv_order ? *problem.kv_order : Tensor();
}

Tensor in_order(const Tensor& integers, const Tensor& order) {
  return order.defined() ? integers.gather(1, order) : integers;
}

/// What the groups of heads of one pass have in common.
struct SharedPass {
  int64_t groups;
  TokensOfRanks of_heads_step, of_keys_step;
  AttentionProblem tables;  // with ids and positions as attention takes the tokens
};

SharedPass make_shared_pass(const ContextProblem& problem, int64_t groups) {
  const Tensor heads_order = order_of_heads_step(problem), keys_order = order_of_keys_step(problem);
  SharedPass pass{.groups = groups,
                  .of_heads_step = TokensOfRanks(heads_order, problem.heads.size()),
                  .of_keys_step = TokensOfRanks(keys_order, problem.keys.size()),
                  .tables = problem.narrow_tokens(0, problem.shared)};
  AttentionProblem& tables = pass.tables;
  const int64_t tokens = problem.heads.size() * problem.shared;
  const auto of_queries = [&](const Tensor& of_all) {
    return in_order(of_all.narrow(1, problem.keys.rank() * tokens, tokens), heads_order).contiguous();
  };
  tables.query_segment_ids = tables.key_segment_ids = of_queries(problem.kv_ids);
  if (heads_order.defined()) {
    tables.query_positions = tables.key_positions = std::nullopt;
  } else if (problem.kv_positions) {
    tables.query_positions = tables.key_positions = of_queries(*problem.kv_positions);
  }
  if (problem.keys.size() == 1) return pass;
  tables.key_segment_ids = in_order(problem.kv_ids, keys_order);
  if (!problem.kv_positions) return pass;
  tables.key_positions = in_order(*problem.kv_positions, keys_order);
  tables.is_in_order = keys_order.defined() && problem.heads.size() == 1;  // else queries are those of several ranks
  return pass;
}

/// Group `i` of heads, with the keys of the heads group. `rows`: (B, h * s, F) of q, k and v; undefined without a heads
/// step.
AttentionProblem part_of_group(const ContextProblem& problem, const SharedPass& pass, const Tensor& rows, int64_t i) {
  AttentionProblem part = pass.tables;
  if (rows.defined()) {
    const auto tensors = split_features(rows, heads_of_group(problem, pass.groups));
    part.query = tensors[0], part.key = tensors[1], part.value = tensors[2];
  } else {
    for (Tensor* tensor : {&part.query, &part.key, &part.value}) *tensor = tensor->chunk(pass.groups, 2)[i];
  }
  if (part.sinks) part.sinks = sinks_of_group(problem, *part.sinks, i, pass.groups);
  return part;
}

/// The part with the keys and values of all ranks, which come as start_gathering_keys sent them.
void take_keys(const ContextProblem& problem, const SharedPass& pass, AttentionProblem& part, const Tensor& gathering) {
  const auto heads = heads_of_group(problem, pass.groups);
  const Tensor rows = pass.of_keys_step.as_rows(RankGroup::finish(gathering));
  const auto tensors = split_features(rows, {heads[1], heads[2]});
  part.key = tensors[0], part.value = tensors[1];
}

// ---------------------------------------------------------------- transfers

void start_exchanging(const ContextProblem& problem, int64_t groups, const std::vector<Tensor>& tensors,
                      SharedTransfers& started) {
  for (int64_t i = 0; i < groups; ++i) {
    std::vector<Tensor> parts;
    for (const Tensor& tensor : tensors) parts.push_back(heads_by_rank(tensor, problem.heads.size(), i, groups));
    started.heads.push_back(problem.heads.start_exchange(pack_features(parts)));
  }
}

/// Of each group of heads the keys and values of the heads group, (B, h * s, F). `rows` as part_of_group takes them.
void start_gathering_keys(const ContextProblem& problem, int64_t groups, at::TensorList rows,
                          SharedTransfers& started) {
  for (int64_t i = 0; i < groups; ++i) {
    if (rows.empty()) {
      const AttentionProblem own = problem.narrow_tokens(0, problem.shared);
      started.keys.push_back(problem.keys.start_gather(
          pack_features({own.key.chunk(groups, 2)[i].flatten(2), own.value.chunk(groups, 2)[i].flatten(2)})));
    } else {
      const int64_t begin = heads_of_group(problem, groups)[0].features();
      started.keys.push_back(
          problem.keys.start_gather(pack_features({rows[i].narrow(2, begin, rows[i].size(2) - begin)})));
    }
  }
}

/// Heads that come back to their tokens, (h, B, s, F) of each group, into (B, s, H, D) each.
std::vector<Tensor> finish_exchanging_back(const ContextProblem& problem, const std::vector<Tensor>& exchanging,
                                           const std::vector<HeadsOfGroup>& heads) {
  const int64_t ranks = problem.heads.size(), batch = problem.own.query.size(0);
  const auto groups = static_cast<int64_t>(exchanging.size());
  std::vector<Tensor> results;
  for (const HeadsOfGroup& of_one : heads) {
    results.push_back(
        at::empty({batch, problem.shared, ranks * groups * of_one.count, of_one.width}, problem.own.query.options()));
  }
  for (int64_t i = 0; i < groups; ++i) {
    const auto received = split_features(RankGroup::finish(exchanging[i]), heads);
    for (size_t j = 0; j < heads.size(); ++j) {
      copy_features(heads_by_rank(results[j], ranks, i, groups), received[j].flatten(3));
    }
  }
  return results;
}

}  // namespace

SharedTransfers start_shared_forward(const ContextProblem& problem) {
  problem.rank();  // groups of other sizes are refused
  SharedTransfers started;
  // Keys alone, from which nothing goes back in this pass, travel beside the local part where ranks have one.
  const bool has_local_parts = problem.shared < problem.own.query.size(1);
  started.groups = problem.heads.size() == 1 && has_local_parts ? 1 : problem.groups_of_heads();
  if (problem.heads.size() > 1) {
    const AttentionProblem own = problem.narrow_tokens(0, problem.shared);
    start_exchanging(problem, started.groups,
                     {own.query, repeat_heads(problem, own.key), repeat_heads(problem, own.value)}, started);
  }
  if (problem.keys.size() > 1) {
    std::vector<Tensor> rows;
    for (Tensor& received : started.heads) {
      received = TokensOfRanks({}, problem.heads.size()).as_rows(RankGroup::finish(received));
      rows.push_back(received);
    }
    start_gathering_keys(problem, started.groups, rows, started);
  }
  return started;
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> finish_shared_forward(const ContextProblem& problem,
                                                                      SharedTransfers started) {
  const bool exchanges = problem.heads.size() > 1, gathers = problem.keys.size() > 1;
  SharedPass pass = make_shared_pass(problem, started.groups);
  std::vector<Tensor> outs, lses, going_back, exchanged;
  for (int64_t i = 0; i < pass.groups; ++i) {
    Tensor rows;
    if (exchanges) {
      rows = std::exchange(started.heads[i], {});
      if (!gathers) rows = pass.of_heads_step.as_rows(RankGroup::finish(rows));
    }
    AttentionProblem part = part_of_group(problem, pass, rows, i);
    if (gathers) take_keys(problem, pass, part, std::exchange(started.keys[i], {}));
    const auto [out, lse] = attend_part(part, problem.backend);
    lses.push_back(lse);
    if (!exchanges) {
      outs.push_back(out);
      continue;
    }
    going_back.push_back(problem.heads.start_exchange(pass.of_heads_step.pack_by_rank({out})));
    exchanged.push_back(rows), exchanged.push_back(out);
  }
  const Tensor lse = join(lses, 1);
  if (!exchanges) return {join(outs, 2), lse, {}};
  const HeadsOfGroup heads = query_heads(problem, problem.own.value.size(3), pass.groups);
  return {finish_exchanging_back(problem, going_back, {heads})[0], lse, exchanged};
}

SharedTransfers start_shared_backward(const ContextProblem& problem, const Tensor& grad_out, at::TensorList exchanged) {
  problem.rank();
  SharedTransfers started;
  started.groups = problem.groups_of_heads();
  if (problem.heads.size() > 1) start_exchanging(problem, started.groups, {grad_out}, started);
  if (problem.keys.size() > 1) {
    std::vector<Tensor> rows;
    for (size_t i = 0; i < exchanged.size(); i += 2) rows.push_back(exchanged[i]);
    start_gathering_keys(problem, started.groups, rows, started);
  }
  return started;
}

PartGradients finish_shared_backward(const ContextProblem& problem, SharedTransfers started,
                                     const AttentionGradients& gradients, at::TensorList exchanged) {
  const bool exchanges = problem.heads.size() > 1, gathers = problem.keys.size() > 1;
  SharedPass pass = make_shared_pass(problem, started.groups);
  const auto heads = heads_of_group(problem, pass.groups);
  const HeadsOfGroup heads_of_out = query_heads(problem, problem.own.value.size(3), pass.groups);
  const auto dtype = problem.own.query.scalar_type();
  // One addition rounds once; sums of more are kept in float32.
  const auto sum_dtype = problem.keys.size() > 2 && dtype != at::kDouble ? at::kFloat : dtype;
  PartGradients result;
  if (problem.own.sinks) result.sinks = at::zeros_like(*problem.own.sinks);
  std::vector<Tensor> queries, sums, going_back;
  for (int64_t i = 0; i < pass.groups; ++i) {
    AttentionProblem part = part_of_group(problem, pass, exchanges ? exchanged[2 * i] : Tensor(), i);
    if (gathers) take_keys(problem, pass, part, std::exchange(started.keys[i], {}));
    AttentionGradients of_group{.lse = gradients.lse.chunk(pass.groups, 1)[i]};
    if (exchanges) {
      const Tensor rows = pass.of_heads_step.as_rows(RankGroup::finish(std::exchange(started.heads[i], {})));
      of_group.grad_out = split_features(rows, {heads_of_out})[0], of_group.out = exchanged[2 * i + 1];
    } else {
      of_group.grad_out = gradients.grad_out.chunk(pass.groups, 2)[i];
      of_group.out = gradients.out.chunk(pass.groups, 2)[i];
    }
    const PartGradients own = attend_part_backward(part, problem.backend, of_group);
    if (part.sinks) sinks_of_group(problem, result.sinks, i, pass.groups).copy_(own.sinks);
    if (gathers) {
      const Tensor packed = pass.of_keys_step.pack_by_rank({own.key, own.value});
      sums.push_back(problem.keys.start_sum(packed.to(sum_dtype)));
      queries.push_back(own.query);
    } else if (exchanges) {
      going_back.push_back(
          problem.heads.start_exchange(pass.of_heads_step.pack_by_rank({own.query, own.key, own.value})));
    } else {
      return {own.query, own.key, own.value, result.sinks};
    }
  }
  if (gathers && !exchanges) {
    const AttentionProblem own = problem.narrow_tokens(0, problem.shared);
    result.query = join(queries, 2);
    result.key = at::empty(own.key.sizes(), own.key.options());
    result.value = at::empty(own.value.sizes(), own.value.options());
  }
  for (size_t i = 0; i < sums.size(); ++i) {
    const Tensor sum = RankGroup::finish(sums[i]).squeeze(0);
    const auto keys = split_features(exchanges ? sum.to(dtype) : sum, {heads[1], heads[2]});
    if (exchanges) {
      going_back.push_back(
          problem.heads.start_exchange(pass.of_heads_step.pack_by_rank({queries[i], keys[0], keys[1]})));
    } else {
      const auto place = [&](const Tensor& of_all) { return of_all.chunk(pass.groups, 2)[i].flatten(2); };
      copy_features(place(result.key), keys[0].flatten(2)), copy_features(place(result.value), keys[1].flatten(2));
    }
  }
  if (!exchanges) return result;
  const auto back = finish_exchanging_back(problem, going_back, heads);
  const int64_t key_heads = problem.own.key.size(2);
  result.query = back[0];
  result.key = sum_repeated_heads(back[1], key_heads), result.value = sum_repeated_heads(back[2], key_heads);
  return result;
}

}  // namespace selfattn
