// Host times of calls from C++: one JSON line a call on standard output, to which host_time.py adds where and when.
//
//     build/tests/cpp/selfattn_host_time [repeats]
//
// `host_us`: until a call returns, the median; the device is idle before each. `host_us_in_a_row`: of one of a few
// calls in a row that nothing waits for. Bfloat16, on a GPU where there is one.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <iostream>
#include <string>
#include <vector>

#include <ATen/ops/scaled_dot_product_attention.h>
#include <selfattn/ops.h>
#include <torch/cuda.h>
#include <torch/types.h>
#include <torch/utils.h>

namespace {

using Call = std::function<void()>;
using Clock = std::chrono::steady_clock;

constexpr int64_t kHeads = 32, kKvHeads = 8, kDim = 128, kPageSize = 64;
constexpr int64_t kLength = 1024;  // slots of the one row
constexpr int64_t kPrompt = 64;    // tokens of the forward call
constexpr int kCallsInARow = 50;   // fewer launches than a stream's queue holds
constexpr int kDefaultRepeats = 300;

void synchronise() {
  if (torch::cuda::is_available()) torch::cuda::synchronize();
}

/// Microseconds of one of so many calls in a row, the median; the device is idle before them.
double median_time(const Call& call, int calls, int repeats) {
  std::vector<double> times;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    synchronise();
    const auto start = Clock::now();
    for (int i = 0; i < calls; ++i) call();
    times.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count() / calls);
  }
  synchronise();
  std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
  return times[repeats / 2];
}

void measure(const std::string& name, const std::string& implementation, int repeats, const Call& call) {
  call();
  std::cout << "{\"case\": \"C++, " << name << "\", \"impl\": \"" << implementation
            << "\", \"host_us\": " << median_time(call, 1, repeats)
            << ", \"host_us_in_a_row\": " << median_time(call, kCallsInARow, std::max(repeats / 10, 1)) << "}"
            << std::endl;
}

/// Beside it, PyTorch's own attention to all keys, by the kernel of its choice.
void measure_sdpa(const std::string& name, int repeats, const torch::Tensor& q, const torch::Tensor& k,
                  const torch::Tensor& v) {
  const auto heads_first = [](const torch::Tensor& tensor) { return tensor.transpose(1, 2); };
  measure(name, "sdpa", repeats, [&, q = heads_first(q), k = heads_first(k), v = heads_first(v)] {
    at::scaled_dot_product_attention(q, k, v, {}, /*dropout_p=*/0.0, /*is_causal=*/false, {}, /*enable_gqa=*/true);
  });
}

}  // namespace

int main(int argc, char** argv) {
  const int repeats = argc > 1 ? std::max(std::stoi(argv[1]), 1) : kDefaultRepeats;
  const torch::NoGradGuard no_grad;
  const auto device = torch::cuda::is_available() ? torch::kCUDA : torch::kCPU;
  const auto of = torch::dtype(torch::kBFloat16).device(device);
  const auto integers = of.dtype(torch::kInt);

  const std::string heads = std::to_string(kHeads) + ":" + std::to_string(kKvHeads) + " D" + std::to_string(kDim);
  const std::string one_row = " B1 L" + std::to_string(kLength) + " " + heads;
  const std::string one_prompt = "forward B1 S" + std::to_string(kPrompt) + " " + heads;

  const auto q = torch::randn({1, 1, kHeads, kDim}, of);
  const auto k = torch::randn({1, 1, kKvHeads, kDim}, of), v = torch::randn_like(k);
  const auto keys = torch::randn({1, kLength, kKvHeads, kDim}, of), values = torch::randn_like(keys);
  const auto lengths = torch::full({1}, kLength, integers), position = lengths.unsqueeze(1) - 1;
  const auto measure_decode = [&](const std::string& name, const auto& options, const auto& k_cache,
                                  const auto& v_cache) {
    measure(name, "selfattn", repeats,
            [&] { selfattn::attention_with_kv_cache(q, k_cache, v_cache, lengths, options); });
  };
  const auto table = torch::arange(kLength / kPageSize, integers).unsqueeze(0);
  const auto options = selfattn::KVCacheAttentionOptions().backend("flash");
  measure_decode("decode" + one_row, options, keys, values);
  measure_decode("decode by auto" + one_row, selfattn::KVCacheAttentionOptions(), keys, values);
  measure_decode("decode over pages" + one_row, selfattn::KVCacheAttentionOptions(options).page_table(table),
                 keys.view({-1, kPageSize, kKvHeads, kDim}), values.view({-1, kPageSize, kKvHeads, kDim}));
  measure_sdpa("decode" + one_row, repeats, q, keys, values);

  measure("append" + one_row, "selfattn", repeats, [&] { selfattn::append_kv_cache(k, v, position, keys, values); });
  const auto rotation = selfattn::QkNormRopeOptions().norm(false);
  measure("rotate and append" + one_row, "selfattn", repeats,
          [&] { selfattn::qk_norm_rope_append(q, k, v, position, keys, values, rotation); });

  const auto prompt = torch::randn({1, kPrompt, kHeads, kDim}, of);
  const auto prompt_keys = torch::randn({1, kPrompt, kKvHeads, kDim}, of);
  const auto attention = selfattn::AttentionOptions().causal(false).backend("flash");
  measure(one_prompt, "selfattn", repeats,
          [&] { selfattn::multihead_attention(prompt, prompt_keys, prompt_keys, attention); });
  measure_sdpa(one_prompt, repeats, prompt, prompt_keys, prompt_keys);
  return 0;
}
