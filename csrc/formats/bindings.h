// The registry of formats in Python.
#pragma once

#include <nanobind/nanobind.h>

namespace glm_fused {

void bind_formats(nanobind::module_& m);

}  // namespace glm_fused
