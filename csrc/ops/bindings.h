#pragma once

#include <nanobind/nanobind.h>

namespace glm_fused {

// Binds DecodeStep.
void bind_decode_step(nanobind::module_& m);

}  // namespace glm_fused
