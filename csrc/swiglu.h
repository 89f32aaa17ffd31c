// SwiGLU and the sigmoid on the CPU are the shaders' own text.
#pragma once

#include "rounding.h"

namespace glm_fused {
namespace {  // internal linkage: compiled once per instruction set

inline float multiply_add(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}

}  // namespace
}  // namespace glm_fused

#include "metal/swiglu.h"
