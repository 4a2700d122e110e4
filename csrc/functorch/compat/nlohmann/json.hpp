// Stands where <ATen/functorch/Interpreter.h> includes a JSON library, which PyTorch does not install, to write down a
// transform. Nothing here does that: these are declarations alone, and a call would not link.
#pragma once

#include <string>

namespace nlohmann {

class json {
 public:
  json() = default;
  template <typename T>
  explicit json(const T& value);
  static json parse(const std::string& text);
  std::string dump() const;
  template <typename T>
  T get() const;
};

}  // namespace nlohmann
