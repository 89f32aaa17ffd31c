// MLX's affine formats: 2, 3, 4, 5, 6 or 8 bits with a scale and a bias of
// type S per group. `fast` is the lane order of MLX's qmv_fast, else of qmv.
#pragma once

#include "formats/cells.h"
#include "mlx_arithmetic.h"

template <typename S, int group_size, int bits, bool fast>
struct Affine {
  typedef S scale_type;
  typedef typename CellOf<bits>::type Cell;

  GLM_CONST int packs = fast && bits > 2 ? 2 : 1;
  GLM_CONST int values = mlx_affine::get_pack_factor<bits, 32>() * packs;
  GLM_CONST int bytes = mlx_affine::get_bytes_per_pack<bits, 32>() * packs;
  GLM_CONST int block = values * kLanes;
  GLM_CONST int scale_rows = 1;          // that share their scales
  GLM_CONST bool whole_tiles = fast;     // n % 8 == 0, k % 512 == 0
  GLM_CONST bool factors = false;        // `biases` is one factor a matrix
  GLM_CONST bool partial_lanes = false;  // a row ends between lanes

  struct Cells {
    Cell w[bytes / sizeof(Cell)];
    float scale;
    float bias;
  };

  static METAL_FUNC int row_bytes(int k) {
    return k / 8 * bits;
  }
  static METAL_FUNC int row_scales(int k) {
    return k / group_size;
  }
  static METAL_FUNC int column_bytes(int column) {
    return column / values * bytes;
  }
  static METAL_FUNC int column_scales(int column) {
    return column / group_size;
  }
  // MLX's qmv takes the last block, whole or not, through its safe functions.
  static METAL_FUNC int whole_blocks(int k) {
    return fast ? k / block : (k - 1) / block;
  }

  static METAL_FUNC void load(
      const device uint8_t* w,
      const device S* scales,
      const device S* biases,
      int,
      thread Cells& cells) {
    load_cells<Cell, bytes>(w, cells.w);
    cells.scale = scales[0];
    cells.bias = biases[0];
  }

  template <typename T>
  static METAL_FUNC float load_x(const device T* x, thread float* x_thread) {
    return mlx_affine::load_vector<T, float, values, bits>(x, x_thread);
  }

  // The same for values that are the lane's own.
  template <typename T>
  static METAL_FUNC float load_own(const thread T* x, thread float* x_thread) {
    return mlx_affine::own_load_vector<T, float, values, bits>(x, x_thread);
  }

  static METAL_FUNC void dot(
      const thread Cells& cells,
      const thread float* x_thread,
      float sum,
      thread float& result) {
    result += mlx_affine::qdot<float, values, bits>(
        (const thread uint8_t*)cells.w, x_thread, cells.scale, cells.bias, sum);
  }

  // Gives the weights themselves.
  static METAL_FUNC void decode(const thread Cells& cells, thread float* w) {
    mlx_affine::dequantize<float, values, bits>(
        (const thread uint8_t*)cells.w, cells.scale, cells.bias, w);
  }

  static METAL_FUNC float total(float sum, const device S*) {
    return sum;
  }
  static METAL_FUNC float reduce(float result) {
    return simd_sum(result);
  }
};
