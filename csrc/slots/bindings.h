#pragma once

#include <nanobind/nanobind.h>

#include <memory>

#include "slots/ops.h"

namespace glm_fused::slots {

// nanobind's own shared_ptr to an object of Python's takes the GIL when it is
// destroyed, which threads of streams and readers must not wait for.
template <class T>
struct Handle {
  std::shared_ptr<T> value;
};
using BankHandle = Handle<SlotBank>;
using UseHandle = Handle<SlotUse>;

void bind(nanobind::module_& m);

}  // namespace glm_fused::slots
