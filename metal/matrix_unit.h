// Products of 8 x 8 matrices, which a simdgroup computes together; the order of
// their sums is the hardware's. As in MLX's kernels, a lane holds two
// neighbouring values of one row.
#pragma once

#include <metal_simdgroup_matrix>

#include "numbers.h"

GLM_CONST int kSide = 8;  // rows and columns of a matrix

// The place of a lane's first value.
METAL_FUNC int matrix_row(int lane) {
  return (lane / 4 & 4) + lane / 2 % 4;
}
METAL_FUNC int matrix_column(int lane) {
  return (lane / 4 & 2) * 2 + lane % 2 * 2;
}

// Adds a b to c.
METAL_FUNC void multiply_matrices(float2 a, float2 b, thread float2& c) {
  simdgroup_matrix<float, kSide, kSide> left, right, sum;
  reinterpret_cast<thread float2&>(left.thread_elements()) = a;
  reinterpret_cast<thread float2&>(right.thread_elements()) = b;
  reinterpret_cast<thread float2&>(sum.thread_elements()) = c;
  simdgroup_multiply_accumulate(sum, left, right, sum);
  c = reinterpret_cast<thread float2&>(sum.thread_elements());
}
