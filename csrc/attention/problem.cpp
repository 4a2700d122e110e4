#include "attention/problem.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include "common/dense_tensor.h"
#include "segment/segment_ids.h"

namespace selfattn {
namespace {

/// Wider than any row, and far from where a sum with a position overflows.
constexpr int64_t kWidestWindow = int64_t{1} << 40;
/// The softmax is one-hot long before; float32 holds it, and its negative.
constexpr double kLargestScale = 1e37;
/// Beyond these float32 would turn a cap, or a logit over it, into 0 or infinity.
constexpr double kLeastSoftcap = 1e-30, kLargestSoftcap = 1e30;

void check_tensor_like_query(const at::Tensor& query, const at::Tensor& tensor, const char* name) {
  check_dtype(tensor, name, query.scalar_type(), "q");
  check_device(tensor, name, query.device(), "q");
}

void check_query_key_value(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  check_dense(q, "q"), check_dense(k, "k"), check_dense(v, "v");
  TORCH_CHECK_TYPE(is_supported_dtype(q.scalar_type()),
                   "selfattn: q must be float64, float32, bfloat16 or float16; got ", q.scalar_type());
  check_tensor_like_query(q, k, "k");
  check_tensor_like_query(q, v, "v");
  TORCH_CHECK_VALUE(q.dim() == 4, "selfattn: q must have four dimensions (B, Sq, NH, DQK); got shape ", q.sym_sizes());
  TORCH_CHECK_VALUE(k.dim() == 4, "selfattn: k must have four dimensions (B, Skv, NKV, DQK); got shape ",
                    k.sym_sizes());
  TORCH_CHECK_VALUE(v.dim() == 4, "selfattn: v must have four dimensions (B, Skv, NKV, DV); got shape ", v.sym_sizes());
  const auto qs = q.sym_sizes(), ks = k.sym_sizes(), vs = v.sym_sizes();
  TORCH_CHECK_VALUE(ks[0] == qs[0], "selfattn: k must have the batch size of q, ", qs[0], "; got ", ks[0]);
  TORCH_CHECK_VALUE(ks[3] == qs[3], "selfattn: k must have the head dimension of q, ", qs[3], "; got ", ks[3]);
  TORCH_CHECK_VALUE(qs[3] > 0, "selfattn: q must have a head dimension of at least 1; got ", qs[3]);
  TORCH_CHECK_VALUE(vs[0] == ks[0] && vs[1] == ks[1] && vs[2] == ks[2],
                    "selfattn: v must have the batch size, length and heads of k, ", ks.slice(0, 3), "; got ",
                    vs.slice(0, 3));
  TORCH_CHECK_VALUE(ks[2] > 0 && qs[2] % ks[2] == 0,
                    "selfattn: the heads of q must be a multiple of the heads of k; got ", qs[2], " and ", ks[2]);
}

/// Whether the device's kernels read the ids as given: those for CUDA do, asserting the range of int64, where both are
/// of one type.
bool kernels_read(const at::Tensor& query_ids, const at::Tensor& key_ids) {
  return query_ids.is_cuda() && query_ids.scalar_type() == key_ids.scalar_type();
}

/// Segment ids or positions of a call, those of keys being those of queries where they are not given. Whether there are
/// any; the names are the arguments', for the messages.
bool check_integers_of_tokens(const OptionalTensor& of_queries, const char* name, const OptionalTensor& of_keys,
                              const char* key_name, const AttentionProblem& problem) {
  if (!of_queries) {
    TORCH_CHECK_VALUE(!of_keys, "selfattn: ", key_name, " must come with ", name, "; got ", key_name, " alone");
    return false;
  }
  check_token_integers(*of_queries, name, problem.query, "q");
  if (of_keys) {
    check_token_integers(*of_keys, key_name, problem.key, "k");
  } else {
    TORCH_CHECK_VALUE(problem.query_length() == problem.key_length(), "selfattn: ", key_name,
                      " must be given where q and k differ in length; got lengths ", problem.query_length(), " and ",
                      problem.key_length());
  }
  return true;
}

void add_segment_ids(const AttentionArguments& arguments, AttentionProblem& problem) {
  if (!check_integers_of_tokens(arguments.segment_ids, "segment_ids", arguments.kv_segment_ids, "kv_segment_ids",
                                problem)) {
    return;
  }
  std::pair ids{*arguments.segment_ids, arguments.kv_segment_ids.value_or(*arguments.segment_ids)};
  if (!kernels_read(ids.first, ids.second)) ids = segment_ids_as_int32(ids.first, ids.second);
  std::tie(problem.query_segment_ids, problem.key_segment_ids) = ids;
}

/// After the rest of the problem, which says whether a rule reads them.
void add_positions(const AttentionArguments& arguments, AttentionProblem& problem) {
  TORCH_CHECK_VALUE(!arguments.in_order || arguments.positions,
                    "selfattn: in_order must come with positions; got in_order alone");
  if (!check_integers_of_tokens(arguments.positions, "positions", arguments.kv_positions, "kv_positions", problem)) {
    return;
  }
  const auto [query, key] = as_int32(*arguments.positions, "positions",
                                     arguments.kv_positions.value_or(*arguments.positions), "kv_positions");
  if (!problem.is_causal && !problem.has_window()) return;
  problem.query_positions = query;
  problem.key_positions = key;
  problem.is_in_order = arguments.in_order;
}

}  // namespace

double scale_of(const at::Tensor& query, std::optional<double> qk_scale, double softcap) {
  if (!qk_scale) qk_scale = 1.0 / std::sqrt(static_cast<double>(query.sym_size(3).guard_int(__FILE__, __LINE__)));
  if (query.scalar_type() == at::kDouble) return *qk_scale;
  const double largest = softcap > 0.0 ? kLargestScale * std::min(softcap, 1.0) : kLargestScale;  // over the cap, too
  return std::clamp(*qk_scale, -largest, largest);
}

int64_t window_of(int64_t window) { return std::min(window, kWidestWindow); }

void check_attention_numbers(const AttentionArguments& arguments) {
  TORCH_CHECK_VALUE(!arguments.qk_scale || std::isfinite(*arguments.qk_scale),
                    "selfattn: qk_scale must be finite; got ", *arguments.qk_scale);
  TORCH_CHECK_VALUE(arguments.window_left >= -1, "selfattn: window_left must be -1 (unbounded) or at least 0; got ",
                    arguments.window_left);
  TORCH_CHECK_VALUE(arguments.window_right >= -1, "selfattn: window_right must be -1 (unbounded) or at least 0; got ",
                    arguments.window_right);
  const double softcap = arguments.softcap;
  TORCH_CHECK_VALUE(std::isfinite(softcap) && softcap >= 0.0,
                    "selfattn: softcap must be finite and at least 0 (0: none); got ", softcap);
  TORCH_CHECK_VALUE(softcap == 0.0 || (softcap >= kLeastSoftcap && softcap <= kLargestSoftcap),
                    "selfattn: softcap must be 0 (none) or from ", kLeastSoftcap, " to ", kLargestSoftcap, "; got ",
                    softcap);
}

void check_token_integers(const at::Tensor& integers, const char* name, const at::Tensor& tokens, const char* owner) {
  check_integer_rows(integers, name);
  check_device(integers, name, tokens.device(), owner);
  TORCH_CHECK_VALUE(integers.sym_size(0) == tokens.sym_size(0) && integers.sym_size(1) == tokens.sym_size(1),
                    "selfattn: ", name, " must have the shape (B, S) = ", tokens.sym_sizes().slice(0, 2), "; got ",
                    integers.sym_sizes());
}

void check_sinks(const at::Tensor& sinks, const c10::SymInt& heads, const at::Device& device, const char* owner) {
  check_floating_point(sinks, "sinks", device, owner);
  TORCH_CHECK_VALUE(sinks.dim() == 1 && sinks.sym_size(0) == heads, "selfattn: sinks must have the shape (NH,) = [",
                    heads, "]; got ", sinks.sym_sizes());
}

bool AttentionProblem::requires_grad() const { return any_requires_grad({query, key, value, sinks}); }

std::vector<at::Tensor> AttentionProblem::save(SavedNumbers& numbers) const {
  numbers["is_in_order"] = is_in_order;
  numbers["is_causal"] = is_causal;
  numbers["scale"] = scale;
  numbers["window_left"] = window_left;
  numbers["window_right"] = window_right;
  numbers["softcap"] = softcap;
  return {query,
          key,
          value,
          as_saved(sinks),
          as_saved(query_segment_ids),
          as_saved(key_segment_ids),
          as_saved(query_positions),
          as_saved(key_positions)};
}

AttentionProblem AttentionProblem::restore(at::TensorList saved, const SavedNumbers& numbers) {
  return {.query = saved[0],
          .key = saved[1],
          .value = saved[2],
          .query_segment_ids = as_optional(saved[4]),
          .key_segment_ids = as_optional(saved[5]),
          .sinks = as_optional(saved[3]),
          .query_positions = as_optional(saved[6]),
          .key_positions = as_optional(saved[7]),
          .is_in_order = numbers.at("is_in_order").toBool(),
          .is_causal = numbers.at("is_causal").toBool(),
          .scale = numbers.at("scale").toDouble(),
          .window_left = numbers.at("window_left").toInt(),
          .window_right = numbers.at("window_right").toInt(),
          .softcap = numbers.at("softcap").toDouble()};
}

AttentionProblem make_attention_problem(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                        const AttentionArguments& arguments, bool needs_lse) {
  check_query_key_value(q, k, v);
  check_attention_numbers(arguments);
  AttentionProblem problem{.query = q, .key = k, .value = v};
  add_segment_ids(arguments, problem);
  if (arguments.sinks) check_sinks(*arguments.sinks, problem.query_heads(), q.device(), "q");
  problem.sinks = arguments.sinks;
  problem.is_causal = arguments.is_causal;
  problem.scale = scale_of(q, arguments.qk_scale, arguments.softcap);
  problem.window_left = window_of(arguments.window_left);
  problem.window_right = window_of(arguments.window_right);
  problem.softcap = arguments.softcap;
  problem.needs_lse = needs_lse;
  add_positions(arguments, problem);
  return problem;
}

}  // namespace selfattn
