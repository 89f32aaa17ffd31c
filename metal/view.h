// Where the rows of a strided array lie.
#pragma once

#include "numbers.h"
#include "params.h"

// Gives the place of a row's first value.
METAL_FUNC long row_offset(const constant ViewParams& view, int row) {
  const int position = row % view.length;
  const int head = row / view.length % view.heads;
  const int sequence = row / view.length / view.heads;
  return sequence * view.sequence_stride + head * view.head_stride +
      position * view.position_stride;
}
