// This is silu(gate) * up as MLX's separate kernels compute it, every step
// rounded to the activation type; one text for the shaders and the CPU. The
// includer brings multiply_add, bits_of, float_of and round_to for its Type.
#pragma once

#include "exp.h"

namespace glm_fused {

// Gives e^x for x >= 0. It has no branch, so that the CPU takes several at
// once.
static inline float exp_positive(float x) {
  const float e = exp_finite(x);
  // Beyond, e^x overflows; or x is NaN.
  return x <= 88.72283f ? e : x + float_of(0x7f800000u);
}

// MLX's Sigmoid is 1 / (1 + e^|x|), mirrored for x >= 0.
template <typename Type>
static inline float sigmoid(float x, Type type) {
  const float e = round_to(exp_positive(x < 0 ? -x : x), type);
  const float y = round_to(1.0f / round_to(1.0f + e, type), type);
  return x < 0 ? y : round_to(1.0f - y, type);
}

template <typename Type>
static inline float swiglu(float gate, float up, Type type) {
  const float silu = round_to(gate * sigmoid(gate, type), type);
  return round_to(silu * up, type);
}

}  // namespace glm_fused
