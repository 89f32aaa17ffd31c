// These kernels lie between and after the products of an expert layer, which
// MLX's own kernels or grouped_experts.h compute; they round where moe_decode
// does.
#pragma once

#include "numbers.h"
#include "swiglu.h"

GLM_CONST int kThreads = 256;  // of a threadgroup

template <typename T>
[[kernel, max_total_threads_per_threadgroup(kThreads)]] void swiglu(
    const device T* gate [[buffer(0)]],
    const device T* up [[buffer(1)]],
    device T* act [[buffer(2)]],
    uint i [[thread_position_in_grid]]) {
  act[i] =
      static_cast<T>(glm_fused::swiglu(gate[i], up[i], glm_fused::As<T>()));
}

// Sets sum[token] to the sum over its choices, in order, of score * y.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(kThreads)]] void expert_sum(
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
    // No compiler contracts this product with the sum. It makes -0 a 0, which
    // no sum shows.
    total = total + glm_fused::multiply_add(value, scores[pair], 0.0f);
  }
  sum[size_t(token) * hidden + column] = static_cast<T>(total);
}
