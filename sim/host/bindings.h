#pragma once

#include <nanobind/nanobind.h>

namespace glm_fused {

// Makes `_simulator`, the package's way to the simulated Metal host.
void bind_simulator(nanobind::module_& parent);

}  // namespace glm_fused
