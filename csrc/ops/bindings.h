#pragma once

#include <nanobind/nanobind.h>

namespace glm_fused {

// Binds the ops.
void bind_ops(nanobind::module_& m);

// Binds the halves of a layer.
void bind_blocks(nanobind::module_& m);

// Binds DecodeStep.
void bind_decode_step(nanobind::module_& m);

// Binds Decoding.
void bind_decoding(nanobind::module_& m);

}  // namespace glm_fused
