#include "attention/select_backend.h"

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <sstream>

namespace selfattn {
namespace {

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

const AttentionBackend& find_backend(Backend name, const AttentionProblem&) {
  static const AttentionBackend* const backends[] = {&flash_backend(), &cudnn_backend(), &aten_backend(),
                                                     &reference_backend()};
  return find_by_name<AttentionProblem>(name, backends);
}

void check_can_serve(Backend name, const std::vector<std::string>& reasons) {
  TORCH_CHECK_NOT_IMPLEMENTED(reasons.empty(), "selfattn: backend '", to_string(name),
                              "' cannot serve this call: ", c10::Join("; ", reasons));
}

std::string explain_selection(std::optional<Backend> chosen,
                              const std::array<std::vector<std::string>, kBackendsByPreference.size()>& reasons) {
  std::ostringstream text;
  for (size_t i = 0; i < reasons.size(); ++i) {
    const Backend candidate = kBackendsByPreference[i];
    text << (i == 0 ? "" : "\n") << to_string(candidate) << ": ";
    if (!reasons[i].empty()) {
      text << "cannot serve this call: " << c10::Join("; ", reasons[i]);
    } else {
      text << (chosen == candidate ? "chosen" : "can serve this call");
    }
  }
  return text.str();
}

}  // namespace selfattn
