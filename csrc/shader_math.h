// What the shaders' own text asks for where the CPU includes it.
#pragma once

#include "rounding.h"

namespace glm_fused {
namespace {  // internal linkage: compiled once per instruction set

inline float multiply_add(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}

// No compiler contracts it with a sum (-ffp-contract=off).
inline float product(float a, float b) {
  return a * b;
}

inline float square_root(float x) {
  return __builtin_sqrtf(x);
}

}  // namespace
}  // namespace glm_fused
