// Copies rows to caches: a thread moves a value, whose type matters for its
// size alone.
#pragma once

#include "numbers.h"
#include "view.h"

GLM_CONST int kThreads = 256;  // of a threadgroup

template <typename T>
[[kernel, max_total_threads_per_threadgroup(kThreads)]] void copy_rows(
    const device T* from [[buffer(0)]],
    device T* to [[buffer(1)]],
    const constant CopyParams& params [[buffer(2)]],
    uint2 at [[thread_position_in_grid]]) {
  const int column = at.x, row = at.y;
  to[row_offset(params.to, row) + column * params.to.column_stride] =
      from[row_offset(params.from, row) + column * params.from.column_stride];
}

// The same for two caches, whose rows may be of unlike widths. The grid is
// (the wider one's columns, rows, 2).
template <typename T>
[[kernel, max_total_threads_per_threadgroup(kThreads)]] void copy_pair(
    const device T* from_a [[buffer(0)]],
    device T* to_a [[buffer(1)]],
    const constant CopyParams& a [[buffer(2)]],
    const device T* from_b [[buffer(3)]],
    device T* to_b [[buffer(4)]],
    const constant CopyParams& b [[buffer(5)]],
    uint3 at [[thread_position_in_grid]]) {
  const int column = at.x, row = at.y;
  if (at.z == 0 && column < a.from.columns) {
    to_a[row_offset(a.to, row) + column * a.to.column_stride] =
        from_a[row_offset(a.from, row) + column * a.from.column_stride];
  }
  if (at.z == 1 && column < b.from.columns) {
    to_b[row_offset(b.to, row) + column * b.to.column_stride] =
        from_b[row_offset(b.from, row) + column * b.from.column_stride];
  }
}
