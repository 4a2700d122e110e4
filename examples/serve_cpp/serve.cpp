// Serves a language model over bytes, in a process that holds no Python: continuous batching over a paged KV cache.
//
//   serve MODEL.pt NUM_PAGES MAX_TOKENS [DEVICE]
//
// MODEL.pt is TorchScript, as examples/train_packed exports it. Each line of standard input is a prompt, and may come
// at any time. Each token is printed as soon as it is known, "REQUEST TOKEN", and at the end of a request "REQUEST
// end".
#include <poll.h>
#include <selfattn/kv_cache.h>
#include <torch/csrc/jit/passes/tensorexpr_fuser.h>
#include <torch/script.h>
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <exception>
#include <iostream>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace {

constexpr int64_t kBoundary = 256;  // the token that opens and ends a document
constexpr int64_t kPageSize = 16, kRows = 8, kMaxLength = 2048;

struct Request {
  int64_t number;
  std::vector<int64_t> unread;  // tokens that the model reads in the next step: the prompt, then one at a time
  int64_t left;                 // how many more may be generated
  int64_t length() const { return static_cast<int64_t>(unread.size()) + left; }
};

/// Lines of standard input, as they come.
class Lines {
 public:
  bool have_ended() const { return has_ended_; }

  /// Those that have come; `wait`: until there is one, or the end.
  std::vector<std::string> take(bool wait) {
    pollfd input{STDIN_FILENO, POLLIN, 0};
    while (!has_ended_ && poll(&input, 1, wait && lines_.empty() ? -1 : 0) > 0) {
      char bytes[4096];
      const ssize_t count = read(STDIN_FILENO, bytes, sizeof bytes);
      has_ended_ = count <= 0;
      for (ssize_t i = 0; i < count; ++i) {
        if (bytes[i] == '\n')
          lines_.push_back(std::exchange(begun_, {}));
        else
          begun_ += bytes[i];
      }
    }
    if (has_ended_ && !begun_.empty()) lines_.push_back(std::exchange(begun_, {}));
    return std::exchange(lines_, {});
  }

 private:
  std::string begun_;
  std::vector<std::string> lines_;
  bool has_ended_ = false;
};

void serve(torch::jit::Module model, int64_t num_pages, int64_t max_tokens, const at::Device& device) {
  const auto cache_options =
      selfattn::KVCacheOptions(model.attr("num_layers").toInt(), model.attr("num_kv_heads").toInt(),
                               model.attr("head_dim").toInt())
          .dtype((*model.parameters().begin()).scalar_type())
          .device(device);
  auto cache = selfattn::KVCache::paged(cache_options, num_pages, kPageSize, /*max_sequences=*/kRows, kMaxLength);
  selfattn::PageAllocator allocator(cache);
  std::vector<std::tuple<at::Tensor, at::Tensor, at::Tensor, std::optional<at::Tensor>>> layers;
  for (int64_t i = 0; i < cache.layers(); ++i) {
    const selfattn::KVCacheLayer layer = cache.layer(i);
    layers.emplace_back(layer.keys, layer.values, layer.lengths, layer.page_table);
  }
  const auto on_device = [&](const std::vector<int64_t>& values) { return torch::tensor(values).to(device); };

  Lines lines;
  std::deque<Request> waiting;
  std::map<int64_t, Request> running;  // by their rows of the cache
  int64_t num_requests = 0;
  while (!running.empty() || !waiting.empty() || !lines.have_ended()) {
    for (const std::string& line : lines.take(/*wait=*/running.empty() && waiting.empty())) {
      Request request{num_requests++, {kBoundary}, max_tokens};
      for (const unsigned char byte : line) request.unread.push_back(byte);
      if (request.length() <= std::min(kMaxLength, num_pages * kPageSize)) {
        waiting.push_back(std::move(request));
      } else {
        std::cout << request.number << " too long" << std::endl;
      }
    }

    // Who came first is served first, as soon as a row is free and pages for all of its tokens are.
    for (int64_t row = 0; row < kRows && !waiting.empty(); ++row) {
      if (running.contains(row)) continue;
      if ((waiting.front().length() + kPageSize - 1) / kPageSize > allocator.free_pages()) break;
      allocator.reserve(row, waiting.front().length());
      running.emplace(row, std::move(waiting.front()));
      waiting.pop_front();
    }
    if (running.empty()) continue;

    // One step: prompts and single tokens side by side, segment ids say of which row of the cache.
    std::vector<int64_t> tokens, ids, last, counts(kRows);
    for (const auto& [row, request] : running) {
      tokens.insert(tokens.end(), request.unread.begin(), request.unread.end());
      ids.insert(ids.end(), request.unread.size(), row);
      last.push_back(static_cast<int64_t>(tokens.size()) - 1);
      counts[row] = static_cast<int64_t>(request.unread.size());
    }
    const c10::IValue no_positions;  // those behind the lengths
    const at::Tensor logits =
        model.forward({on_device(tokens).unsqueeze(0), on_device(ids).unsqueeze(0), no_positions, layers})
            .toTensor()[0];
    cache.advance(on_device(counts));
    const at::Tensor next = logits.index_select(0, on_device(last)).argmax(-1).cpu();

    int64_t index = 0;
    for (auto entry = running.begin(); entry != running.end();) {
      auto& [row, request] = *entry;
      const int64_t token = next[index++].item<int64_t>();
      request.unread = {token};
      std::cout << request.number << ' ' << token << std::endl;
      if (token != kBoundary && --request.left > 0) {
        ++entry;
      } else {
        std::cout << request.number << " end" << std::endl;
        allocator.release(row);
        entry = running.erase(entry);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4 || argc > 5) {
    std::cerr << "usage: serve MODEL.pt NUM_PAGES MAX_TOKENS [DEVICE]\n";
    return 2;
  }
  try {
    const torch::InferenceMode inference;
    // Steps have any number of tokens, and fused kernels would be compiled anew for many of them.
    torch::jit::setTensorExprFuserEnabled(false);
    const at::Device device(argc == 5 ? argv[4] : "cpu");
    torch::jit::Module model = torch::jit::load(argv[1], device);
    model.eval();
    serve(model, std::stoll(argv[2]), std::stoll(argv[3]), device);
  } catch (const c10::Error& error) {
    std::cerr << "serve: " << error.what_without_backtrace() << '\n';
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "serve: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
