// Moves a state dict between Python and C++, both ways.
//
//   exchange_state FROM_PYTHON.pt TO_PYTHON.pt
//
// FROM_PYTHON: a dict of x, segment_ids, and state: the state dict of selfattn.SelfAttention(64, SelfAttentionConfig(
// head_dim=16, num_kv_heads=2, qk_norm=True, use_bias=True, sinks=True)). TO_PYTHON gets a dict of tensors: loaded_out,
// the output under that state; out, the output of a C++ module with parameters of its own; and those parameters by
// name.
#include <selfattn/selfattn.h>
#include <torch/torch.h>

#include <fstream>
#include <iostream>
#include <iterator>

namespace {

using StateDict = c10::Dict<std::string, torch::Tensor>;

selfattn::SelfAttention make_module() {
  return selfattn::SelfAttention(
      selfattn::SelfAttentionOptions(64).head_dim(16).num_kv_heads(2).qk_norm(true).use_bias(true).sinks(true));
}

void load_state(selfattn::SelfAttention& module, const c10::Dict<torch::IValue, torch::IValue>& state) {
  const torch::NoGradGuard no_grad;
  auto parameters = module->named_parameters();
  TORCH_CHECK(state.size() == parameters.size(), "expected ", parameters.size(), " tensors; got ", state.size());
  for (auto& parameter : parameters) parameter.value().copy_(state.at(parameter.key()).toTensor());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: exchange_state FROM_PYTHON.pt TO_PYTHON.pt\n";
    return 2;
  }
  std::ifstream file(argv[1], std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const auto input = torch::pickle_load(bytes).toGenericDict();
  const torch::Tensor x = input.at("x").toTensor(), ids = input.at("segment_ids").toTensor();

  selfattn::SelfAttention from_python = make_module(), own = make_module();
  load_state(from_python, input.at("state").toGenericDict());
  StateDict output;
  for (const auto& parameter : own->named_parameters()) output.insert(parameter.key(), parameter.value().detach());
  output.insert("loaded_out", from_python->forward(x, {}, {}, ids).detach());
  output.insert("out", own->forward(x, {}, {}, ids).detach());
  const std::vector<char> written = torch::pickle_save(output);
  std::ofstream(argv[2], std::ios::binary).write(written.data(), static_cast<std::streamsize>(written.size()));
  return 0;
}
