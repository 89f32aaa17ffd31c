// The softmax's exponential is e^x for x <= 0 in fp32.
#pragma once

#include "exp.h"

namespace glm_fused {

// It is 0 below -87, so that no result is subnormal.
static inline float exp_negative(float x) {
  if (!(x >= -87.0f)) {
    return x < 0 ? 0.0f : x;  // also NaN
  }
  return exp_finite(x);
}

}  // namespace glm_fused
