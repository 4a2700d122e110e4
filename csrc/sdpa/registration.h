#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <memory>
#include <string>
#include <vector>

namespace selfattn::sdpa {

/// The flash attention operators of a namespace, served by selfattn on one dispatch key until its end.
class Registration {
 public:
  /// `operators`: "aten", or in tests a namespace with operators of the same names and other arguments.
  explicit Registration(c10::DispatchKey dispatch_key, const std::string& operators = "aten");
  Registration(const Registration&) = delete;
  Registration& operator=(const Registration&) = delete;
  ~Registration();

 private:
  using Kernel = std::shared_ptr<const c10::SafeKernelFunction>;

  static Kernel kernel_to_replace(const c10::OperatorHandle& op, c10::DispatchKey dispatch_key);

  std::string name_;  // of its kernels, in the dispatcher's words
  std::vector<std::pair<c10::OperatorName, Kernel>> replaced_;
  std::unique_ptr<torch::Library> library_;
};

}  // namespace selfattn::sdpa
