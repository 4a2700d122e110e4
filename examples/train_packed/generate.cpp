// Continues prompts with a model that Python trained, in a process that holds no Python.
//
// The model is TorchScript: it names the operators of selfattn, which libselfattn.so registers when the program starts.
#include <torch/csrc/jit/passes/tensorexpr_fuser.h>
#include <torch/script.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "generator.h"

namespace {

constexpr const char* kUsage = R"(usage: generate [OPTION...] MODEL.pt PROMPT_FILE...

Prints how each prompt goes on, in their order, and how many tokens were generated a second.

  --bytes N         at most so many more bytes of each prompt (100)
  --rows N          prompts that are continued at once (4); when one ends, the next one takes its place
  --temperature T   below 1: likely bytes are drawn more often than the model says; 0: the likeliest (0.7)
  --device NAME     cpu or cuda (cpu); on cuda the model computes in bfloat16
  --uncached        without a KV cache: the whole text again for each byte, one prompt after the other
  --record FILE.pt  seconds (), and for each prompt the generated tokens (N,) and the logits (tokens read, vocabulary)
)";
constexpr uint64_t kSeed = 0;  // the same bytes are drawn in every run

struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Arguments {
  std::string model;
  std::vector<std::string> prompts;
  std::string record;
  bool is_cached = true;
  GeneratorOptions generator{
      .max_bytes = 100, .rows = 4, .temperature = 0.7, .records_logits = false, .device = at::kCPU};
};

/// The number that all of the text says.
template <typename Number>
std::optional<Number> read_number(const std::string& text) {
  Number number{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  return error == std::errc() && end == text.data() + text.size() ? std::optional(number) : std::nullopt;
}

int64_t read_count(const std::string& option, const std::string& text) {
  const std::optional<int64_t> count = read_number<int64_t>(text);
  if (!count || *count < 1) throw UsageError(option + ": expected a positive whole number, got " + text);
  return *count;
}

double read_temperature(const std::string& option, const std::string& text) {
  const std::optional<double> temperature = read_number<double>(text);
  if (!temperature || !(*temperature >= 0.0)) throw UsageError(option + ": expected a number >= 0, got " + text);
  return *temperature;
}

at::Device read_device(const std::string& option, const std::string& text) {
  if (text != "cpu" && !text.starts_with("cuda")) throw UsageError(option + ": expected cpu or cuda, got " + text);
  return at::Device(text);
}

Arguments parse(const std::vector<std::string>& words) {
  Arguments parsed;
  std::vector<std::string> files;
  for (auto word = words.begin(); word != words.end(); ++word) {
    const std::string& option = *word;
    const auto value = [&]() -> const std::string& {
      if (++word == words.end()) throw UsageError(option + ": expected a value, got none");
      return *word;
    };
    if (option == "--bytes") {
      parsed.generator.max_bytes = read_count(option, value());
    } else if (option == "--rows") {
      parsed.generator.rows = read_count(option, value());
    } else if (option == "--temperature") {
      parsed.generator.temperature = read_temperature(option, value());
    } else if (option == "--device") {
      parsed.generator.device = read_device(option, value());
    } else if (option == "--uncached") {
      parsed.is_cached = false;
    } else if (option == "--record") {
      parsed.record = value();
      parsed.generator.records_logits = true;
    } else if (option.starts_with("--")) {
      throw UsageError(option + ": no such option");
    } else {
      files.push_back(option);
    }
  }
  if (files.size() < 2) throw UsageError("expected a model and at least one prompt");
  parsed.model = files.front();
  parsed.prompts.assign(files.begin() + 1, files.end());
  return parsed;
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot read ", path);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// A tuple of tensors, as the usage says.
void write_record(const std::string& path, double seconds, const std::vector<Sequence>& sequences) {
  std::vector<c10::IValue> tensors{torch::tensor(seconds, at::kDouble)};
  for (const Sequence& sequence : sequences) {
    tensors.emplace_back(torch::tensor(sequence.generated, at::kLong));
    tensors.emplace_back(torch::cat(sequence.logits).cpu());
  }
  const std::vector<char> bytes = torch::jit::pickle_save(c10::ivalue::Tuple::create(std::move(tensors)));
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  TORCH_CHECK(file, "cannot write ", path);
}

/// Prints the texts in the order of the prompts, each byte as soon as those before it are there.
class Printer {
 public:
  Printer(const std::vector<std::string>& names, const std::vector<Sequence>& sequences)
      : names_(names), sequences_(sequences) {}

  void print_what_is_new() {
    for (; current_ < sequences_.size(); ++current_, printed_ = 0) {
      const Sequence& sequence = sequences_[current_];
      if (printed_ == 0 && !sequence.generated.empty() && sequences_.size() > 1) {
        std::cout << (current_ > 0 ? "\n" : "") << "== " << names_[current_] << '\n';
      }
      for (; printed_ < sequence.generated.size(); ++printed_) {
        const int64_t token = sequence.generated[printed_];
        if (token != kBoundary) std::cout << static_cast<char>(token);
      }
      if (!sequence.has_ended) break;
    }
    std::cout << std::flush;
  }

 private:
  const std::vector<std::string>& names_;
  const std::vector<Sequence>& sequences_;
  size_t current_ = 0, printed_ = 0;
};

void run(const Arguments& arguments) {
  const torch::InferenceMode inference;
  torch::manual_seed(kSeed);
  // Prompts have any length, and fused kernels would be compiled anew for many of them.
  torch::jit::setTensorExprFuserEnabled(false);
  const GeneratorOptions& options = arguments.generator;
  torch::jit::Module model = torch::jit::load(arguments.model, options.device);
  model.eval();
  if (options.device.is_cuda()) model.to(at::kBFloat16);

  std::vector<Sequence> sequences;
  for (const std::string& path : arguments.prompts) sequences.emplace_back(read_file(path));
  size_t longest = 0;
  for (const Sequence& sequence : sequences) longest = std::max(longest, sequence.prompt.size());
  Printer printer(arguments.prompts, sequences);
  const auto print = [&] { printer.print_what_is_new(); };

  using Clock = std::chrono::steady_clock;
  Clock::time_point start;
  if (arguments.is_cached) {
    CachedGenerator generator(model, static_cast<int64_t>(longest) + options.max_bytes, options);
    start = Clock::now();
    generator.run(sequences, print);
  } else {
    model.forward({torch::full({1, 1}, kBoundary, at::TensorOptions(at::kLong).device(options.device))});
    start = Clock::now();
    generate_uncached(model, options, sequences, print);
  }
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();

  size_t count = 0;
  for (const Sequence& sequence : sequences) count += sequence.generated.size();
  std::cout << '\n';
  std::cerr << count << " tokens of " << sequences.size() << " prompts, "
            << (arguments.is_cached ? std::to_string(options.rows) + " at once with a KV cache" : "without a KV cache")
            << ": " << static_cast<double>(count) / seconds << " tokens/s\n";
  if (options.records_logits) write_record(arguments.record, seconds, sequences);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse({argv + 1, argv + argc}));
  } catch (const UsageError& error) {
    std::cerr << "generate: " << error.what() << "\n\n" << kUsage;
    return 2;
  } catch (const c10::Error& error) {
    std::cerr << "generate: " << error.what_without_backtrace() << '\n';
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "generate: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
