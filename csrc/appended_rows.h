// Appending rows to a cache, as the CPU and Metal do it.
#pragma once

#include "mlx/allocator.h"
#include "mlx/array.h"
#include "taken_rows.h"

namespace glm_fused {

// Gives the array that has rows [at, end) of `buffer` replaced its memory: that
// of the buffer, or a new one. Returns whether it is the buffer's.
template <class Allocate>
bool place_appended(
    const mlx::core::array& buffer,
    int at,
    int end,
    mlx::core::array& appended,
    const Allocate& allocate) {
  if (take_rows(buffer, at, end - at)) {
    appended.copy_shared_buffer(buffer);
    return true;
  }
  allocate(appended);
  take_new_rows(appended, end);
  return false;
}

// Returns how many values lie from the first of these rows to the last.
inline size_t span_of_rows(const mlx::core::array& buffer, int count) {
  const auto& strides = buffer.strides();
  if (buffer.size() == 0 || count == 0) {
    return 0;
  }
  return 1 + (buffer.shape(0) - 1) * strides[0] + (count - 1) * strides[2] +
      (buffer.shape(3) - 1) * strides[3];
}

// Gives `rows` [b, t, width] the memory of the first rows of `buffer`.
inline void share_first_rows(
    const mlx::core::array& buffer,
    mlx::core::array& rows) {
  const auto& strides = buffer.strides();
  const bool together = buffer.flags().row_contiguous && rows.shape(0) == 1;
  rows.copy_shared_buffer(
      buffer,
      {strides[0], strides[2], strides[3]},
      {together, together, false},
      span_of_rows(buffer, rows.shape(1)));
}

// Gives `rows` [b, 1, l, width] the memory of those of `buffer` from `begin`
// on.
inline void
share_rows(const mlx::core::array& buffer, int begin, mlx::core::array& rows) {
  rows.copy_shared_buffer(
      buffer,
      buffer.strides(),
      {false, false, false},
      span_of_rows(buffer, rows.shape(2)),
      begin * buffer.strides(2));
}

// Returns rows [begin, end) of `buffer` [b, 1, capacity, width].
inline mlx::core::array
rows_between(const mlx::core::array& buffer, int begin, int end) {
  mlx::core::array rows(
      {buffer.shape(0), 1, end - begin, buffer.shape(3)},
      buffer.dtype(),
      nullptr,
      {});
  share_rows(buffer, begin, rows);
  return rows;
}

}  // namespace glm_fused
