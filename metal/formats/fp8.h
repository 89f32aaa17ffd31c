// The FP8 of released checkpoints: e4m3 codes with one scale of type S for a
// square of 128 rows and 128 columns.
#pragma once

#include "formats/cells.h"
#include "mlx_arithmetic.h"

template <typename S, bool whole>
struct Fp8 {
  typedef S scale_type;

  GLM_CONST int values = 8;
  GLM_CONST int block = values * kLanes;
  GLM_CONST int group_size = 128;
  GLM_CONST int scale_rows = 128;        // that share their scales
  GLM_CONST bool whole_tiles = whole;    // n % 8 == 0, k % 512 == 0
  GLM_CONST bool factors = false;        // `biases` is one factor a matrix
  GLM_CONST bool partial_lanes = false;  // a row ends between lanes

  struct Cells {
    uint8_t w[values];
    float scale;
  };

  static METAL_FUNC int row_bytes(int k) {
    return k;
  }
  static METAL_FUNC int row_scales(int k) {
    return k / group_size;
  }
  static METAL_FUNC int column_bytes(int column) {
    return column;
  }
  static METAL_FUNC int column_scales(int column) {
    return column / group_size;
  }
  static METAL_FUNC int whole_blocks(int k) {
    return k / block;
  }

  static METAL_FUNC void load(
      const device uint8_t* w,
      const device S* scales,
      const device S*,
      int,
      thread Cells& cells) {
    load_cells<uint8_t, values>(w, cells.w);
    cells.scale = static_cast<float>(scales[0]);
  }

  template <typename T>
  static METAL_FUNC float load_x(const device T* x, thread float* x_thread) {
    mlx_fp::load_vector<T, float, values>(x, x_thread);
    return 0;
  }

  // The same for values that are the lane's own.
  template <typename T>
  static METAL_FUNC float load_own(const thread T* x, thread float* x_thread) {
    mlx_fp::own_load_vector<T, float, values>(x, x_thread);
    return 0;
  }

  static METAL_FUNC void dot(
      const thread Cells& cells,
      const thread float* x_thread,
      float,
      thread float& result) {
    float accum = 0;
    for (int i = 0; i < values; i++) {
      accum = fma(x_thread[i], mlx_fp::Dequantize<8>{}(cells.w[i]), accum);
    }
    result = fma(cells.scale, accum, result);
  }

  // Gives the weights themselves.
  static METAL_FUNC void decode(const thread Cells& cells, thread float* w) {
    GLM_UNROLL
    for (int i = 0; i < values; i++) {
      w[i] = cells.scale * mlx_fp::Dequantize<8>{}(cells.w[i]);
    }
  }

  static METAL_FUNC float total(float sum, const device S*) {
    return sum;
  }
  static METAL_FUNC float reduce(float result) {
    return simd_sum(result);
  }
};
