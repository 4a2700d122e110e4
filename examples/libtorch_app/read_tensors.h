#pragma once

#include <torch/torch.h>

#include <fstream>
#include <iterator>
#include <string>
#include <vector>

/// The tuple of tensors in a file that Python's torch.save or C++'s torch::pickle_save wrote.
inline std::vector<torch::Tensor> read_tensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const torch::IValue tuple = torch::pickle_load(bytes);
  std::vector<torch::Tensor> tensors;
  for (const auto& element : tuple.toTupleRef().elements()) tensors.push_back(element.toTensor());
  return tensors;
}
