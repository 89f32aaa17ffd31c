#pragma once

#include <nanobind/nanobind.h>

namespace glm_fused {

// `_simulator`: sets the simulated Metal host up and reads its launches.
void bind_simulator(nanobind::module_& parent);

}  // namespace glm_fused
