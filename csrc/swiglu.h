// silu(gate) * up as MLX's separate kernels compute it: every step rounded to
// the activation type. Shared by the fused kernels and the reference.
#pragma once

#include "rounding.h"

namespace glm_fused {
namespace {  // internal linkage: compiled once per instruction set

// e^x for x >= 0, within 0.5001 ulp. Written out in double so that every
// instruction set and every libm gives the same bits.
inline float exp_positive(float x) {
  if (!(x < 89.0f)) {  // also NaN
    return x + __builtin_inff();
  }
  const double v = x;
  const double shifter = 0x1.8p52;
  const double n = __builtin_fma(v, 1.4426950408889634, shifter) - shifter;
  const double r = __builtin_fma(n, -0.6931471805599453, v);
  double p = 1.0 / 39916800;
  const double taylor[] = {
      1.0 / 3628800,
      1.0 / 362880,
      1.0 / 40320,
      1.0 / 5040,
      1.0 / 720,
      1.0 / 120,
      1.0 / 24,
      1.0 / 6,
      0.5,
      1.0,
      1.0};
  for (double c : taylor) {
    p = __builtin_fma(p, r, c);
  }
  const uint64_t exponent =
      static_cast<uint64_t>(static_cast<int64_t>(n) + 1023) << 52;
  double scale;
  memcpy(&scale, &exponent, 8);
  return static_cast<float>(p * scale);
}

// 1 / (1 + e^|x|), mirrored for x >= 0: MLX's Sigmoid.
inline float sigmoid(float x, FloatType type) {
  const float e = round_to(exp_positive(__builtin_fabsf(x)), type);
  const float y = round_to(1.0f / round_to(1.0f + e, type), type);
  return x < 0 ? y : round_to(1.0f - y, type);
}

inline float swiglu(float gate, float up, FloatType type) {
  const float silu = round_to(gate * sigmoid(gate, type), type);
  return round_to(silu * up, type);
}

}  // namespace
}  // namespace glm_fused
