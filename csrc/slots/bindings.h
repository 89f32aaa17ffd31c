#pragma once

#include <nanobind/nanobind.h>

namespace glm_fused::slots {

void bind(nanobind::module_& m);

}  // namespace glm_fused::slots
