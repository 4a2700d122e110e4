// The switch: an object in C++, and a class of TorchScript's for Python's handle.
#include <selfattn/sdpa.h>
#include <torch/custom_class.h>

#include "sdpa/registration.h"

namespace selfattn {

SdpaOverride::SdpaOverride(c10::DispatchKey dispatch_key)
    : registration_(std::make_unique<sdpa::Registration>(dispatch_key)) {}
SdpaOverride::SdpaOverride(SdpaOverride&&) noexcept = default;
SdpaOverride& SdpaOverride::operator=(SdpaOverride&&) noexcept = default;
SdpaOverride::~SdpaOverride() = default;

namespace sdpa {
namespace {

/// Active from its construction to remove(), or to its end.
class Handle final : public torch::CustomClassHolder {
 public:
  Handle(const std::string& dispatch_key, const std::string& operators)
      : registration_(std::make_unique<Registration>(c10::parseDispatchKey(dispatch_key), operators)) {}

  void remove() { registration_.reset(); }

 private:
  std::unique_ptr<Registration> registration_;
};

}  // namespace
}  // namespace sdpa
}  // namespace selfattn

TORCH_LIBRARY_FRAGMENT(selfattn, m) {
  using selfattn::sdpa::Handle;
  m.class_<Handle>("SdpaOverride")
      .def(torch::init<const std::string&, const std::string&>(), "",
           {torch::arg("dispatch_key"), torch::arg("operators") = "aten"})
      .def("remove", [](const c10::intrusive_ptr<Handle>& handle) { handle->remove(); });
}
