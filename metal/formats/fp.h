// mxfp4, mxfp8 (a power of two per 32 values) and nvfp4 (an e4m3 scale per
// 16). `fast` is the lane order of MLX's fp_qmv_fast, else of fp_qmv.
#pragma once

#include "formats/cells.h"
#include "mlx_arithmetic.h"

template <int group_size, int bits, bool fast, bool global_scale = false>
struct Fp {
  typedef uint8_t scale_type;
  typedef typename CellOf<bits>::type Cell;

  GLM_CONST int packs = fast ? 2 : 1;
  GLM_CONST int values = mlx_fp::get_pack_factor<32, bits>() * packs;
  GLM_CONST int bytes = mlx_fp::get_bytes_per_pack<32>() * packs;
  GLM_CONST int block = values * kLanes;
  GLM_CONST int scale_rows = 1;           // that share their scales
  GLM_CONST bool whole_tiles = fast;      // n % 8 == 0, k % 512 == 0
  GLM_CONST bool factors = global_scale;  // `biases` is one factor a matrix
  GLM_CONST bool partial_lanes = false;   // a row ends between lanes

  struct Cells {
    Cell w[bytes / sizeof(Cell)];
    float scale;
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
  // MLX's fp_qmv takes the last block, whole or not, through its safe
  // functions.
  static METAL_FUNC int whole_blocks(int k) {
    return fast ? k / block : (k - 1) / block;
  }

  static METAL_FUNC void load(
      const device uint8_t* w,
      const device uint8_t* scales,
      const device uint8_t*,
      int,
      thread Cells& cells) {
    load_cells<Cell, bytes>(w, cells.w);
    cells.scale = mlx_fp::dequantize_scale<float, group_size>(scales[0]);
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
    result += mlx_fp::qdot<float, values, bits>(
        (const thread uint8_t*)cells.w, x_thread, cells.scale);
  }

  // Gives the weights themselves, but for the matrix's factor.
  static METAL_FUNC void decode(const thread Cells& cells, thread float* w) {
    const thread uint8_t* codes = (const thread uint8_t*)cells.w;
    GLM_UNROLL
    for (int i = 0; i < values; i++) {
      const uint8_t code = bits == 8 ? codes[i] : codes[i / 2] >> (i % 2 * 4);
      w[i] = cells.scale * mlx_fp::Dequantize<bits>{}(code);
    }
  }

  static METAL_FUNC float total(float sum, const device uint8_t* factor) {
    return factors ? sum * *(const device float*)factor : sum;
  }
  static METAL_FUNC float reduce(float result) {
    return simd_sum(result);
  }
};
