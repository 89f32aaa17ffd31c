// Arrays of any strides, seen as rows [sequences, heads, length, columns].
#pragma once

#include "metal/params.h"
#include "mlx/array.h"

namespace glm_fused {

// Takes an array of one to four axes; those it lacks have one entry.
inline ViewParams view_of(const mlx::core::array& a) {
  int shape[4] = {1, 1, 1, 1};
  long strides[4] = {};
  const int missing = 4 - static_cast<int>(a.ndim());
  for (int axis = missing; axis < 4; axis++) {
    shape[axis] = a.shape(axis - missing);
    // A single entry's stride may be anything.
    strides[axis] = shape[axis] == 1 ? 0 : a.strides(axis - missing);
  }
  return {
      shape[1],
      shape[2],
      shape[3],
      strides[0],
      strides[1],
      strides[2],
      strides[3]};
}

// Returns the place of a row's first value.
inline int64_t row_offset(const ViewParams& view, int row) {
  const int position = row % view.length;
  const int head = row / view.length % view.heads;
  const int sequence = row / view.length / view.heads;
  return sequence * view.sequence_stride + head * view.head_stride +
      position * view.position_stride;
}

}  // namespace glm_fused
