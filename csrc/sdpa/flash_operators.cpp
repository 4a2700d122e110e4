// The results are those of PyTorch's kernels: the strides of empty_like, lse +inf for a query without keys, and a
// random state that nobody reads.
#include "sdpa/flash_operators.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <selfattn/ops.h>

#include <limits>

#include "attention/flash_attention_op.h"
#include "attention/select_backend.h"

namespace selfattn::sdpa {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// How an operator's tensors lie. Those of selfattn have tokens before heads.
enum class Layout {
  kTokensFirst,  // (B, S, H, D)
  kHeadsFirst,   // (B, H, S, D)
  kRagged,       // (T, H, D), one document after another: one row of a batch of 1
};

at::Tensor to_rows(Layout layout, const at::Tensor& tensor) {
  if (layout == Layout::kTokensFirst) return tensor;
  return layout == Layout::kHeadsFirst ? tensor.transpose(1, 2) : tensor.unsqueeze(0);
}

at::Tensor from_rows(Layout layout, const at::Tensor& rows) {
  if (layout == Layout::kTokensFirst) return rows;
  return layout == Layout::kHeadsFirst ? rows.transpose(1, 2) : rows.squeeze(0);
}

/// With the strides that PyTorch's meta kernels promise, those of empty_like: mostly its own.
at::Tensor laid_out_as(const at::Tensor& like, const at::Tensor& result) {
  const bool is_laid_out = like.is_non_overlapping_and_dense()
                               ? result.strides() == like.strides()
                               : result.strides() == at::empty_like(like, like.options().device(at::kMeta)).strides();
  return is_laid_out ? result : at::empty_like(like).copy_(result);
}

/// One memory: whether two memories hold equal numbers only the device knows.
bool are_same(const at::Tensor& tensor, const at::Tensor& other) {
  return tensor.is_same(other) ||
         (tensor.const_data_ptr() == other.const_data_ptr() && tensor.sizes() == other.sizes() &&
          tensor.strides() == other.strides() && tensor.scalar_type() == other.scalar_type());
}

/// Which pairs of tokens attend.
struct Pairs {
  AttentionArguments arguments;
  /// Whether a query may see no key. Its lse is +inf in PyTorch's contract, and -inf in selfattn's.
  bool may_have_empty_rows;
};

/// Of rows (B, S, H, D); nothing for what segment ids and windows cannot say.
std::optional<Pairs> read_pairs(const Arguments& arguments, Layout layout, const at::Tensor& query,
                                const at::Tensor& key) {
  AttentionArguments pairs{.is_causal = arguments.flag(Name::kIsCausal),
                           .qk_scale = arguments.optional_number(Name::kScale),
                           .window_left = arguments.window(Name::kWindowLeft),
                           .window_right = arguments.window(Name::kWindowRight)};
  const bool is_diagonal = pairs.is_causal || pairs.window_left >= 0 || pairs.window_right >= 0;
  const int64_t query_length = query.size(1), key_length = key.size(1);
  if (layout != Layout::kRagged) return Pairs{pairs, is_diagonal && query_length > key_length};
  const OptionalTensor cum_q = arguments.optional_tensor(Name::kCumSeqQ),
                       cum_k = arguments.optional_tensor(Name::kCumSeqK);
  if (!cum_q || !cum_k) return std::nullopt;
  const bool has_same_lengths = query_length == key_length && are_same(*cum_q, *cum_k);
  // Each document's last query would have to meet its last key; selfattn aligns the ends of the row.
  if (is_diagonal && !has_same_lengths) return std::nullopt;
  pairs.segment_ids = segment_ids_from_cu_seqlens(*cum_q, query_length).unsqueeze(0);
  if (!has_same_lengths) pairs.kv_segment_ids = segment_ids_from_cu_seqlens(*cum_k, key_length).unsqueeze(0);
  return Pairs{pairs, !has_same_lengths};
}

/// A call as the kernels take it.
struct Call {
  AttentionProblem problem;
  bool may_have_empty_rows;
};

/// Nothing for what they, or the arguments of selfattn, cannot say. The backend's constraints are asked, so that no
/// exception decides who serves.
std::optional<Call> read_call(const Arguments& arguments, Layout layout) {
  if (arguments.has_unknown() || arguments.number(Name::kDropout) != 0.0 || arguments.flag(Name::kReturnDebugMask)) {
    return std::nullopt;
  }
  const at::Tensor &q = arguments.tensor(Name::kQuery), &k = arguments.tensor(Name::kKey),
                   &v = arguments.tensor(Name::kValue);
  const int64_t dim = layout == Layout::kRagged ? 3 : 4;
  if (q.dim() != dim || k.dim() != dim || v.dim() != dim) return std::nullopt;
  if (v.size(-1) != q.size(-1)) return std::nullopt;  // the result would not be laid out as the query
  const at::Tensor query = to_rows(layout, q), key = to_rows(layout, k), value = to_rows(layout, v);
  const std::optional<Pairs> pairs = read_pairs(arguments, layout, query, key);
  if (!pairs) return std::nullopt;
  Call call{make_attention_problem(query, key, value, pairs->arguments, /*needs_lse=*/true),
            pairs->may_have_empty_rows};
  if (!reasons_against(flash_backend(), call.problem).empty()) return std::nullopt;
  return call;
}

struct Output {
  at::Tensor out, lse;
};

std::optional<Output> attend(const Arguments& arguments, Layout layout) {
  const std::optional<Call> call = read_call(arguments, layout);
  if (!call) return std::nullopt;
  auto [out, lse] = flash_attention(call->problem);
  if (call->may_have_empty_rows) lse = lse.masked_fill(lse == -kInfinity, kInfinity);
  if (layout == Layout::kRagged) lse = lse.squeeze(0);
  return Output{laid_out_as(arguments.tensor(Name::kQuery), from_rows(layout, out)), lse};
}

std::optional<torch::jit::Stack> differentiate(const Arguments& arguments, Layout layout) {
  const std::optional<Call> call = read_call(arguments, layout);
  if (!call) return std::nullopt;
  at::Tensor lse = arguments.tensor(Name::kLogsumexp);
  if (layout == Layout::kRagged) lse = lse.unsqueeze(0);
  if (call->may_have_empty_rows) lse = lse.masked_fill(lse == kInfinity, -kInfinity);
  const auto [dq, dk, dv] =
      flash_attention_backward(call->problem, {to_rows(layout, arguments.tensor(Name::kGradOut)), std::nullopt,
                                               to_rows(layout, arguments.tensor(Name::kOut)), lse});
  return torch::jit::Stack{laid_out_as(arguments.tensor(Name::kQuery), from_rows(layout, dq)),
                           laid_out_as(arguments.tensor(Name::kKey), from_rows(layout, dk)),
                           laid_out_as(arguments.tensor(Name::kValue), from_rows(layout, dv))};
}

/// The state, the offset and the debug mask of a call without dropout, which nobody reads.
void append_random_state(const at::Tensor& query, torch::jit::Stack& results) {
  const auto numbers = query.options().dtype(at::kUInt64);
  results.emplace_back(at::empty({2}, numbers));
  results.emplace_back(at::empty({}, numbers));
  results.emplace_back(at::empty({0}, query.options()));
}

bool has_lengths(const Arguments& arguments) {
  return arguments.optional_tensor(Name::kCumSeqQ) || arguments.optional_tensor(Name::kCumSeqK);
}

Layout token_layout(const Arguments& arguments) {
  return has_lengths(arguments) ? Layout::kRagged : Layout::kTokensFirst;
}

std::optional<torch::jit::Stack> serve_flash_attention_forward(const Arguments& arguments) {
  const auto output = attend(arguments, token_layout(arguments));
  if (!output) return std::nullopt;
  torch::jit::Stack results{output->out, output->lse};
  append_random_state(arguments.tensor(Name::kQuery), results);
  return results;
}

std::optional<torch::jit::Stack> serve_flash_attention_backward(const Arguments& arguments) {
  return differentiate(arguments, token_layout(arguments));
}

std::optional<torch::jit::Stack> serve_scaled_dot_product_flash_attention(const Arguments& arguments) {
  const auto output = attend(arguments, Layout::kHeadsFirst);
  if (!output) return std::nullopt;
  const at::Tensor &query = arguments.tensor(Name::kQuery), &key = arguments.tensor(Name::kKey);
  torch::jit::Stack results{output->out, output->lse, at::Tensor(), at::Tensor(), query.size(2), key.size(2)};
  append_random_state(query, results);
  return results;
}

std::optional<torch::jit::Stack> serve_scaled_dot_product_flash_attention_backward(const Arguments& arguments) {
  if (has_lengths(arguments)) return std::nullopt;
  return differentiate(arguments, Layout::kHeadsFirst);
}

constexpr Name kForward[] = {Name::kQuery, Name::kKey, Name::kValue, Name::kDropout, Name::kIsCausal, Name::kScale};
constexpr Name kBackward[] = {Name::kGradOut,   Name::kQuery,   Name::kKey,      Name::kValue, Name::kOut,
                              Name::kLogsumexp, Name::kDropout, Name::kIsCausal, Name::kScale};

}  // namespace

at::ArrayRef<FlashOperator> flash_operators() {
  static const FlashOperator operators[] = {
      {"_flash_attention_forward", kForward, 5, serve_flash_attention_forward},
      {"_flash_attention_backward", kBackward, 3, serve_flash_attention_backward},
      {"_scaled_dot_product_flash_attention", kForward, 9, serve_scaled_dot_product_flash_attention},
      {"_scaled_dot_product_flash_attention_backward", kBackward, 3,
       serve_scaled_dot_product_flash_attention_backward}};
  return operators;
}

}  // namespace selfattn::sdpa
