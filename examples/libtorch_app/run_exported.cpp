// Runs a module that Python compiled ahead of time (torch.export, AOTInductor) and compares it with Python's output.
//
//   run_exported PACKAGE.pt2 TENSORS.pt      TENSORS: x, segment ids, output
//
// Exits with 1 where an output differs by more than 1e-5.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <iostream>

#include "read_tensors.h"

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: run_exported PACKAGE.pt2 TENSORS.pt\n";
    return 2;
  }
  const std::vector<torch::Tensor> tensors = read_tensors(argv[2]);
  torch::inductor::AOTIModelPackageLoader loader(argv[1]);
  const torch::Tensor out = loader.run({tensors[0], tensors[1]})[0];
  const double difference = (out - tensors[2]).abs().max().item<double>();
  std::cout << (difference < 1e-5 ? "ok      " : "FAILED  ")
            << "outputs are equal to Python's within 1e-5: " << difference << "\n";
  return difference < 1e-5 ? 0 : 1;
}
