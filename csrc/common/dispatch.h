#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace selfattn {

/// A list of arguments' types.
template <typename... Arguments>
struct Types {};

/// An operator by its name, e.g. "selfattn::merge_attention". `Schema` is the type of a C++ function with the schema's
/// arguments; where one is registered, take its decltype, so that the list is written once.
template <typename Schema>
c10::TypedOperatorHandle<Schema> find_op(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).template typed<Schema>();
}

}  // namespace selfattn
