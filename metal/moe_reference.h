// What lies between and after the products of an unfused expert layer: MLX's
// own kernels do the products, these two round where moe_decode does.
#pragma once

#include "numbers.h"
#include "swiglu.h"

template <typename T>
[[kernel]] void swiglu(
    const device T* gate [[buffer(0)]],
    const device T* up [[buffer(1)]],
    device T* act [[buffer(2)]],
    uint i [[thread_position_in_grid]]) {
  act[i] =
      static_cast<T>(glm_fused::swiglu(gate[i], up[i], glm_fused::As<T>()));
}

// sum[token] = sum over its choices, in order, of score * y[token, choice].
template <typename T>
[[kernel]] void expert_sum(
    const device T* y [[buffer(0)]],
    const device float* scores [[buffer(1)]],
    device T* sum [[buffer(2)]],
    const constant int& top_k [[buffer(3)]],
    const constant int& hidden [[buffer(4)]],
    uint2 at [[thread_position_in_grid]]) {
  const int token = at.y, column = at.x;
  float total = 0;
  for (int choice = 0; choice < top_k; choice++) {
    const int pair = token * top_k + choice;
    const float value = static_cast<float>(y[size_t(pair) * hidden + column]);
    // A product that no compiler contracts with the sum; -0 becomes 0, which
    // no sum shows.
    total = total + glm_fused::multiply_add(value, scores[pair], 0.0f);
  }
  sum[size_t(token) * hidden + column] = static_cast<T>(total);
}
