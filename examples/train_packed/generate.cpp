// Continues a prompt with a model that Python trained, in a process that holds no Python.
//
//   generate MODEL.pt PROMPT_FILE NUM_BYTES LOGITS.pt
//
// MODEL.pt is TorchScript: it names the operator selfattn::self_attention, which libselfattn.so registers when the
// program starts. The continuation (drawn byte by byte, the same in every run) goes to standard output, the logits of
// the prompt to LOGITS.pt, where Python compares them with its own.
#include <selfattn/selfattn.h>
#include <torch/script.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

namespace {

constexpr int64_t kBoundary = 256;    // opens and ends a document
constexpr double kTemperature = 0.7;  // below 1: likely bytes are drawn more often than the model says
constexpr uint64_t kSeed = 0;

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot read ", path);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write_tensor(const at::Tensor& tensor, const std::string& path) {
  const std::vector<char> bytes = torch::jit::pickle_save(tensor);
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  TORCH_CHECK(file, "cannot write ", path);
}

/// tokens (S) -> logits (S, vocabulary)
at::Tensor logits_of(torch::jit::Module& model, const std::vector<int64_t>& tokens) {
  const at::Tensor row = torch::tensor(tokens, at::kLong).unsqueeze(0);
  return model.forward({row}).toTensor().squeeze(0);
}

void run(const std::string& model_path, const std::string& prompt_path, int64_t num_bytes,
         const std::string& logits_path) {
  const torch::InferenceMode inference;
  torch::manual_seed(kSeed);
  torch::jit::Module model = torch::jit::load(model_path, at::kCPU);
  model.eval();

  std::vector<int64_t> tokens{kBoundary};
  for (const unsigned char byte : read_file(prompt_path)) tokens.push_back(byte);
  at::Tensor logits = logits_of(model, tokens);
  write_tensor(logits, logits_path);

  for (int64_t i = 0; i < num_bytes; ++i) {
    const int64_t next = torch::softmax(logits[-1] / kTemperature, 0).multinomial(1).item<int64_t>();
    if (next == kBoundary) break;
    std::cout << static_cast<char>(next) << std::flush;
    tokens.push_back(next);
    logits = logits_of(model, tokens);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: generate MODEL.pt PROMPT_FILE NUM_BYTES LOGITS.pt\n";
    return 2;
  }
  try {
    run(argv[1], argv[2], std::stoll(argv[3]), argv[4]);
  } catch (const std::exception& error) {
    std::cerr << "generate: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
