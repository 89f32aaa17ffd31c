// Rotary embedding: a thread rotates a pair of columns, or copies one of those
// that stay as they are.
#pragma once

#include "numbers.h"
#include "rotation.h"
#include "view.h"

GLM_CONST int kThreads = 256;  // of a threadgroup

template <typename T>
[[kernel, max_total_threads_per_threadgroup(kThreads)]] void rotate_rows(
    const device T* x [[buffer(0)]],
    const device float* cosines [[buffer(1)]],
    const device float* sines [[buffer(2)]],
    device T* y [[buffer(3)]],
    const constant RotateParams& params [[buffer(4)]],
    uint2 at [[thread_position_in_grid]]) {
  const int i = at.x, row = at.y;
  const int pairs = params.cosines.columns;
  const long stride = params.x.column_stride;
  x += row_offset(params.x, row);
  y += size_t(row) * params.x.columns;
  if (i >= pairs) {
    y[pairs + i] = x[(pairs + i) * stride];
    return;
  }
  const int first = params.interleaved ? 2 * i : i;
  const int second = params.interleaved ? 2 * i + 1 : pairs + i;
  const float a = static_cast<float>(x[first * stride]);
  const float b = static_cast<float>(x[second * stride]);
  // The heads of a position share its angles.
  const int length = params.x.length;
  const int angle = row / length / params.x.heads * length + row % length;
  const float cosine = cosines
      [row_offset(params.cosines, angle) + i * params.cosines.column_stride];
  const float sine =
      sines[row_offset(params.sines, angle) + i * params.sines.column_stride];
  const Rotated pair = rotated(a, b, cosine, sine);
  y[first] = static_cast<T>(pair.first);
  y[second] = static_cast<T>(pair.second);
}
