// Sums over a row. Their order is that of a dense dot product
// (formats/dense.h): four columns a lane of each block, one running sum, then a
// tree over the lanes.
#pragma once

#include "formats/dense.h"
#include "numbers.h"

// Gives the sum over a row to every lane.
template <typename T>
METAL_FUNC float sum_of(const device T* x, long stride, int n, int lane) {
  typedef Dense<float> Order;
  float sum = 0;
  for (int first = lane * Order::values; first < n; first += Order::block) {
    for (int i = first; i < min(first + Order::values, n); i++) {
      sum = sum + static_cast<float>(x[i * stride]);
    }
  }
  return simd_broadcast(Order::reduce(sum), 0);
}

// Gives the sum of (x - mean)^2 over a row to every lane.
template <typename T>
METAL_FUNC float
squares_of(const device T* x, long stride, int n, float mean, int lane) {
  typedef Dense<float> Order;
  float sum = 0;
  for (int first = lane * Order::values; first < n; first += Order::block) {
    for (int i = first; i < min(first + Order::values, n); i++) {
      const float centered = static_cast<float>(x[i * stride]) - mean;
      sum = glm_fused::multiply_add(centered, centered, sum);
    }
  }
  return simd_broadcast(Order::reduce(sum), 0);
}
