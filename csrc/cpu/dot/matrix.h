// A checked weight in memory, and the fp32 rows that meet it.
#pragma once

#include <span>
#include <vector>

#include "cpu/dot/dot_kernels.h"
#include "mlx/array.h"

namespace glm_fused::cpu {

// `slots` matrices [n, k] in one format, back to back.
struct Matrix {
  Format format;
  int slots, n, k;
  bool fast_order;
  const Kernel* kernel;
  const uint8_t* planes[kMaxPlanes] = {};
  size_t row_bytes[kMaxPlanes] = {};
  size_t matrix_bytes[kMaxPlanes] = {};

  // Takes the planes of one weight from inputs[next…] and advances `next`.
  Matrix(
      const std::vector<mlx::core::array>& inputs,
      size_t& next,
      const Format& format,
      int k);

  // Where row `row` of a slot lies in each plane.
  void locate(int slot, int row, const uint8_t** at) const;

  struct Rows {
    const Matrix* matrix;
    int slot, row;
  };
  // Rows [row, row + rows) of a slot times panels of `width` vectors each, at
  // most kMaxPanels; y is [panels, width, rows]. `next` says which rows are
  // likely to be met next by this thread.
  void dot(
      int slot,
      int row,
      int rows,
      std::span<const float* const> panels,
      int width,
      float* y,
      const Rows& next = {}) const;
};

// Row `row` of x [rows, k] as fp32.
void load_row(const mlx::core::array& x, size_t row, int k, float* out);

// `count` values of x from element `offset` on, as fp32.
void load_values(
    const mlx::core::array& x,
    size_t offset,
    int count,
    float* out);

// Rounds `count` values to a's dtype and stores them from element `offset`.
void store_row(
    mlx::core::array& a,
    size_t offset,
    const float* values,
    int count);

// Reads the array's buffer once on every thread of the pool; the result only
// keeps the compiler from dropping the reads.
uint32_t stream_read(const mlx::core::array& a);

// Rows of W [n, k] per task: about four tasks a worker, none of them very
// small, at most kMaxTileRows.
int tile_rows(int n, int k, int matrices, int workers);

}  // namespace glm_fused::cpu
