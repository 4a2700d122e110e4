// Loads a TorchScript SelfAttention, saved by C++ or by Python, in a fresh process and compares it with what the writer
// computed.
//
//   load_torchscript MODULE.pt TENSORS.pt      TENSORS: x, segment ids, output, gradient of q_proj.weight for out^2
//
// Exits with 1 where an output or gradient differs.
#include <torch/script.h>
#include <torch/torch.h>

#include <iostream>

#include "read_tensors.h"

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: load_torchscript MODULE.pt TENSORS.pt\n";
    return 2;
  }
  const std::vector<torch::Tensor> tensors = read_tensors(argv[2]);
  torch::jit::Module module = torch::jit::load(argv[1]);
  const torch::Tensor out = module.forward({tensors[0], torch::IValue(), tensors[1]}).toTensor();
  out.square().sum().backward();
  const torch::Tensor gradient = module.attr("q_proj").toModule().attr("weight").toTensor().grad();
  const bool same_out = torch::equal(out, tensors[2]), same_gradient = torch::equal(gradient, tensors[3]);
  std::cout << (same_out ? "ok      " : "FAILED  ") << "outputs are equal\n"
            << (same_gradient ? "ok      " : "FAILED  ") << "gradients are equal\n";
  return same_out && same_gradient ? 0 : 1;
}
