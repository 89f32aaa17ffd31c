// RMSNorm and LayerNorm; a simdgroup takes a row.
#pragma once

#include "lane_sums.h"
#include "norm.h"
#include "numbers.h"
#include "view.h"

template <typename T, typename W>
[[kernel, max_total_threads_per_threadgroup(kLanes)]] void rms_norm(
    const device T* x [[buffer(0)]],
    const device W* weight [[buffer(1)]],
    device T* y [[buffer(2)]],
    const constant NormParams& params [[buffer(3)]],
    uint row [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  const int n = params.x.columns;
  const long stride = params.x.column_stride;
  x += row_offset(params.x, row);
  y += size_t(row) * n;
  const float squares = squares_of(x, stride, n, 0.0f, lane);
  const float inverse = glm_fused::inverse_root(squares, n, params.eps);
  for (int i = lane; i < n; i += kLanes) {
    y[i] = static_cast<T>(glm_fused::normed(
        static_cast<float>(x[i * stride]),
        inverse,
        static_cast<float>(weight[i]),
        glm_fused::As<T>()));
  }
}

template <typename T, typename W, typename B>
[[kernel, max_total_threads_per_threadgroup(kLanes)]] void layer_norm(
    const device T* x [[buffer(0)]],
    const device W* weight [[buffer(1)]],
    const device B* bias [[buffer(2)]],
    device T* y [[buffer(3)]],
    const constant NormParams& params [[buffer(4)]],
    uint row [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  const int n = params.x.columns;
  const long stride = params.x.column_stride;
  x += row_offset(params.x, row);
  y += size_t(row) * n;
  const float mean = sum_of(x, stride, n, lane) / static_cast<float>(n);
  const float squares = squares_of(x, stride, n, mean, lane);
  const float inverse = glm_fused::inverse_root(squares, n, params.eps);
  for (int i = lane; i < n; i += kLanes) {
    y[i] = static_cast<T>(glm_fused::normed(
        static_cast<float>(x[i * stride]) - mean,
        inverse,
        static_cast<float>(weight[i]),
        static_cast<float>(bias[i]),
        glm_fused::As<T>()));
  }
}
