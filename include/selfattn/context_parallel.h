#pragma once

/// Rows whose tokens are spread over the ranks of a process group (context parallelism). docs/distributed.md is the
/// guide.

#include <cstdint>
#include <optional>
#include <string>

#include <ATen/core/Tensor.h>
#include <selfattn/export.h>
#include <torch/arg.h>

namespace selfattn {

/// What a layout may be told.
struct ContextLayoutOptions {
  /// Which tokens a rank holds: "documents" (whole documents, dealt by work; only long ones are split), "head_tail" (of
  /// n ranks, parts r and 2n - 1 - r of each row) or "contiguous" (part r).
  TORCH_ARG(std::string, balance) = "documents";
  /// `shared` is rounded up to a multiple of it: fewer shapes for what is compiled or captured.
  TORCH_ARG(int64_t, bucket) = 128;
};

/// Which tokens of each row a rank holds, and in which order. B rows of S tokens on n ranks; L = ceil(S / n) slots a
/// row on each. A shard holds split documents (with tokens on several ranks) first, then whole ones, each by their
/// first tokens, then padding tokens, then slots that no token fills. On the CPU; move it to where q is.
struct ContextLayout {
  /// (B, L) int64: the index in its row of each slot's token; -1 where no token is.
  at::Tensor indices;
  /// (B, L) int32; -1 where no token is.
  at::Tensor segment_ids;
  /// (B, L) int32: the index in the row; 0 where no token is.
  at::Tensor positions;
  /// (B, L) int32: how many earlier tokens of the row have the same id, for rotary tables; 0 in padding.
  at::Tensor document_positions;
  /// (B, n * shared) int32: of the first `shared` slots of every rank, rank after rank, the number of the
  /// document among those of the row, which come by their first tokens; -1 but for split documents.
  at::Tensor kv_segment_ids;
  /// (B, n * shared) int32.
  at::Tensor kv_positions;
  /// (B, n * shared) int64: which of these slots comes first, second, ... by document, and in it by position; those of
  /// no split document are last.
  at::Tensor kv_order;
  /// (B, S) int64: the slot of each token of the row among the n * L of all ranks, rank after rank.
  at::Tensor slots;
  /// The first slots of each shard, in which every split document lies: the most such tokens of a rank and row, rounded
  /// up to the bucket, at most L. The same on every rank.
  int64_t shared = 0;
  /// No whole document of this rank has a token before it, in any row.
  int64_t local_start = 0;
  /// Whether the tokens of every document stand side by side in their row.
  bool documents_are_runs = true;
};

/// The layout of rank `group_rank` of `group_size`. segment_ids (B, S) int32 or int64 of whole rows, the same on every
/// rank: equal ids are a document, in any order, negative ones padding. Throws c10::TypeError where they are no plain
/// CPU tensor, c10::ValueError for a wrong shape or number, or ids that do not fit in int32.
SELFATTN_API ContextLayout context_layout(const at::Tensor& segment_ids, int64_t group_rank, int64_t group_size,
                                          const ContextLayoutOptions& options = {});

/// What a call of context_parallel_attention is told: of a layout, of its group, and what multihead_attention may be.
struct ContextParallelOptions {
  ContextParallelOptions() = default;
  /// Of a layout on q's device.
  explicit ContextParallelOptions(const ContextLayout& layout)
      : segment_ids_(layout.segment_ids),
        kv_segment_ids_(layout.kv_segment_ids),
        positions_(layout.positions),
        kv_positions_(layout.kv_positions),
        kv_order_(layout.kv_order),
        shared_(layout.shared),
        local_start_(layout.local_start),
        documents_are_runs_(layout.documents_are_runs) {}

  /// (B, L) int32 or int64, of this rank's tokens. This and what follows up to documents_are_runs: as in ContextLayout.
  TORCH_ARG(at::Tensor, segment_ids);
  /// (B, n * shared), of segment_ids' dtype.
  TORCH_ARG(at::Tensor, kv_segment_ids);
  /// (B, L) int32 or int64.
  TORCH_ARG(at::Tensor, positions);
  /// (B, n * shared), of positions' dtype.
  TORCH_ARG(at::Tensor, kv_positions);
  /// (B, n * shared) int64, or unset: gathered keys are brought into that order, in which those that a query may see
  /// lie side by side. The shared slots of each rank must be in it.
  TORCH_ARG(std::optional<at::Tensor>, kv_order);
  /// The slots of each shard that travel, from 0 to L.
  TORCH_ARG(int64_t, shared) = 0;
  /// The first slot of a whole document, from 0 to shared.
  TORCH_ARG(int64_t, local_start) = 0;
  /// Whether windows may count slots in the place of positions.
  TORCH_ARG(bool, documents_are_runs) = false;
  /// As c10d::register_process_group knows it.
  TORCH_ARG(std::string, group_name);
  /// The number of its ranks.
  TORCH_ARG(int64_t, group_size) = 1;
  /// "keys" gathers the keys and values of split documents, "heads" gives every rank all shared tokens and some of the
  /// heads, which group_size must divide; "auto" takes "keys", or "heads" where all tokens travel and that moves fewer
  /// bytes. Beside a heads group: "keys", which is what "auto" is there.
  TORCH_ARG(std::string, method) = "auto";
  /// Of ranks near each other, in one node: they exchange tokens for heads first. Rank `r` of n = heads_group_size *
  /// group_size is rank `r % heads_group_size` of it, and rank `r / heads_group_size` of the group above.
  TORCH_ARG(std::string, heads_group_name);
  /// The number of its ranks, which must divide NH, and divide NKV or be a multiple of it; 1: no such group.
  TORCH_ARG(int64_t, heads_group_size) = 1;
  /// Whether a token sees none behind it in its document.
  TORCH_ARG(bool, causal) = true;
  /// Unset: 1 / sqrt(DQK).
  TORCH_ARG(std::optional<double>, qk_scale);
  /// As in AttentionOptions, for either part.
  TORCH_ARG(std::string, backend) = "auto";
  /// The farthest position before its own that a token sees; -1: any.
  TORCH_ARG(int64_t, window_left) = -1;
  /// The farthest behind it; -1: any.
  TORCH_ARG(int64_t, window_right) = -1;
  /// Logits x become softcap * tanh(x / softcap); 0: no cap.
  TORCH_ARG(double, softcap) = 0.0;
  /// (NH,), the same on every rank; its gradient is a rank's share, and their sum the whole.
  TORCH_ARG(std::optional<at::Tensor>, sinks);
};

/// Exact attention of this rank's queries to the keys of every rank: q (B, L, NH, DQK), k (B, L, NKV, DQK), v (B, L,
/// NKV, DV), the shards of a layout -> (B, L, NH, DV), as multihead_attention of the whole rows gives it. Every rank of
/// the group calls it with the same options and shapes. Differentiable once. Reads nothing on the host.
SELFATTN_API at::Tensor context_parallel_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                   const ContextParallelOptions& options);

}  // namespace selfattn
