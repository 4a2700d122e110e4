#include "attention/select_backend.h"

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <sstream>

namespace selfattn {
namespace {

const AttentionBackend& find_backend(Backend name) {
  static const AttentionBackend* const backends[] = {&flash_backend(), &cudnn_backend(), &aten_backend(),
                                                     &reference_backend()};
  for (const AttentionBackend* backend : backends) {
    if (backend->name == name) return *backend;
  }
  TORCH_INTERNAL_ASSERT(false, "auto names no single backend");
}

std::optional<Backend> first_able(const AttentionProblem& problem) {
  for (const Backend name : kBackendsByPreference) {
    if (reasons_against(find_backend(name), problem).empty()) return name;
  }
  return std::nullopt;
}

struct BackendName {
  std::string_view text;
  Backend backend;
};

constexpr BackendName kBackendNames[] = {
    {"auto", Backend::kAuto},           {"flash", Backend::kFlash},
    {"cudnn", Backend::kCudnn},         {"aten", Backend::kAten},
    {"reference", Backend::kReference}, {"pallas_triton", Backend::kFlash},
    {"triton", Backend::kFlash},        {"xla", Backend::kAten},
};

}  // namespace

std::string_view to_string(Backend backend) {
  return std::find_if(std::begin(kBackendNames), std::end(kBackendNames),
                      [&](const BackendName& name) { return name.backend == backend; })
      ->text;
}

Backend parse_backend(std::string_view name) {
  const auto found = std::find_if(std::begin(kBackendNames), std::end(kBackendNames),
                                  [&](const BackendName& candidate) { return candidate.text == name; });
  if (found == std::end(kBackendNames)) {
    std::ostringstream known;
    for (const BackendName& candidate : kBackendNames) known << (known.tellp() > 0 ? ", " : "") << candidate.text;
    TORCH_CHECK_VALUE(false, "selfattn: backend must be one of ", known.str(), "; got '", name, "'");
  }
  return found->backend;
}

const AttentionBackend& select_backend(Backend name, const AttentionProblem& problem) {
  if (name == Backend::kAuto) {
    const auto able = first_able(problem);
    TORCH_INTERNAL_ASSERT(able, "reference serves every valid call");
    return find_backend(*able);
  }
  const AttentionBackend& backend = find_backend(name);
  const auto reasons = reasons_against(backend, problem);
  TORCH_CHECK_NOT_IMPLEMENTED(reasons.empty(), "selfattn: backend '", to_string(name),
                              "' cannot serve this call: ", c10::Join("; ", reasons));
  return backend;
}

std::string explain_selection(Backend name, const AttentionProblem& problem) {
  const auto chosen = name == Backend::kAuto ? first_able(problem) : std::optional<Backend>(name);
  std::ostringstream text;
  for (const Backend candidate : kBackendsByPreference) {
    const auto reasons = reasons_against(find_backend(candidate), problem);
    text << (candidate == kBackendsByPreference.front() ? "" : "\n") << to_string(candidate) << ": ";
    if (!reasons.empty()) {
      text << "cannot serve this call: " << c10::Join("; ", reasons);
    } else {
      text << (chosen == candidate ? "chosen" : "can serve this call");
    }
  }
  return text.str();
}

}  // namespace selfattn
