// Copies rows to a cache: a thread moves a value, whose type matters for its
// size alone.
#pragma once

#include "numbers.h"
#include "view.h"

template <typename T>
[[kernel]] void copy_rows(
    const device T* from [[buffer(0)]],
    device T* to [[buffer(1)]],
    const constant CopyParams& params [[buffer(2)]],
    uint2 at [[thread_position_in_grid]]) {
  const int column = at.x, row = at.y;
  to[row_offset(params.to, row) + column * params.to.column_stride] =
      from[row_offset(params.from, row) + column * params.from.column_stride];
}
