#include "sdpa/registration.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <mutex>

#include "sdpa/flash_operators.h"

namespace selfattn::sdpa {
namespace {

/// Calls with boxed arguments, so that those that are not known here reach the kernel of before as they came.
class BoxedKernel final : public c10::OperatorKernel {
 public:
  BoxedKernel(const FlashOperator& flash, const c10::FunctionSchema& schema,
              std::shared_ptr<const c10::SafeKernelFunction> previous)
      : serve_(flash.serve),
        positions_(schema),
        num_arguments_(schema.arguments().size()),
        previous_(std::move(previous)) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) const {
    auto results = serve_(Arguments(positions_, torch::jit::last(*stack, num_arguments_)));
    if (!results) return previous_->callBoxed(op, keys, stack);
    torch::jit::drop(*stack, num_arguments_);
    std::move(results->begin(), results->end(), std::back_inserter(*stack));
  }

 private:
  std::optional<torch::jit::Stack> (*serve_)(const Arguments&);
  ArgumentPositions positions_;
  size_t num_arguments_;
  std::shared_ptr<const c10::SafeKernelFunction> previous_;
};

/// The registrations that live, and the lock under which they begin and end.
struct Registry {
  std::mutex mutex;
  std::vector<const Registration*> live;
};

Registry& registry() {
  static auto* registry = new Registry;  // never destroyed: an override may be a global object, and end after it
  return *registry;
}

/// A kernel is replaced on purpose: nobody need be warned of it.
class ExpectReplacement final : public c10::WarningHandler {
 public:
  void process(const c10::Warning& warning) override {
    if (warning.msg().find("Overriding a previously registered kernel") == std::string::npos) {
      outer_->process(warning);
    }
  }

 private:
  c10::WarningHandler* outer_ = c10::WarningUtils::get_warning_handler();
};

c10::OperatorHandle find_operator(const std::string& operators, const FlashOperator& flash) {
  const c10::OperatorName name(operators + "::" + flash.name, "");
  const auto op = c10::Dispatcher::singleton().findSchema(name);
  TORCH_CHECK_NOT_IMPLEMENTED(op, "selfattn: PyTorch must have the operator ", name, " to put kernels in its place");
  const ArgumentPositions positions(op->schema());
  for (const Name argument : flash.required) {
    TORCH_CHECK_NOT_IMPLEMENTED(positions.has(argument), "selfattn: ", name, " must have the argument ",
                                to_string(argument), "; got ", op->schema());
  }
  TORCH_CHECK_NOT_IMPLEMENTED(op->schema().returns().size() == flash.num_results, "selfattn: ", name, " must return ",
                              flash.num_results, " values; got ", op->schema());
  return *op;
}

}  // namespace

/// The kernel that serves now; where that is one of ours, the one that it replaced, since registrations may end in any
/// order.
Registration::Kernel Registration::kernel_to_replace(const c10::OperatorHandle& op, c10::DispatchKey dispatch_key) {
  TORCH_CHECK_NOT_IMPLEMENTED(op.hasComputedKernelForDispatchKey(dispatch_key), "selfattn: PyTorch must have a kernel ",
                              "of ", op.operator_name(), " for ", dispatch_key,
                              " to be replaced; got none: is PyTorch built with CUDA, and is its CUDA library loaded?");
  auto kernel = std::make_shared<const c10::SafeKernelFunction>(op.getComputedKernelForDispatchKey(dispatch_key));
  for (const Registration* other : registry().live) {
    if (other->name_ != kernel->debug()) continue;
    for (const auto& [name, replaced] : other->replaced_) {
      if (name == op.operator_name()) return replaced;
    }
  }
  return kernel;
}

Registration::Registration(c10::DispatchKey dispatch_key, const std::string& operators) {
  const std::lock_guard lock(registry().mutex);
  static int64_t number = 0;
  name_ = c10::str("registered by selfattn::SdpaOverride, number ", ++number);
  std::vector<c10::OperatorHandle> handles;
  for (const FlashOperator& flash : flash_operators()) {
    handles.push_back(find_operator(operators, flash));
    replaced_.emplace_back(handles.back().operator_name(), kernel_to_replace(handles.back(), dispatch_key));
  }
  ExpectReplacement handler;
  const c10::WarningUtils::WarningHandlerGuard guard(&handler);
  library_ = std::make_unique<torch::Library>(torch::Library::IMPL, operators, dispatch_key, __FILE__, __LINE__);
  for (size_t i = 0; i < handles.size(); ++i) {
    const FlashOperator& flash = flash_operators()[i];
    auto kernel = std::make_unique<BoxedKernel>(flash, handles[i].schema(), replaced_[i].second);
    library_->impl(flash.name, torch::CppFunction::makeFromBoxedFunctor(std::move(kernel)).debug(name_));
  }
  registry().live.push_back(this);
}

Registration::~Registration() {
  const std::lock_guard lock(registry().mutex);
  std::erase(registry().live, this);
  library_.reset();  // the kernels of before are let go after the lock: one in Python takes that of Python
}

}  // namespace selfattn::sdpa
