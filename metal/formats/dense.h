// Dense rows of type W in the order of MLX's gemv: four columns a lane, one
// running sum, and its tree over the lanes. With `aligned`, rows of the matrix
// and vectors start at multiples of four values.
#pragma once

#include "numbers.h"

template <typename W, bool aligned = false>
struct Dense {
  typedef uint8_t scale_type;

  GLM_CONST int values = 4;
  GLM_CONST int block = values * kLanes;
  GLM_CONST int scale_rows = 1;  // that share their scales
  GLM_CONST bool whole_tiles = false;
  GLM_CONST bool factors = false;       // `biases` is one factor a matrix
  GLM_CONST bool partial_lanes = true;  // a row may end within a lane's values

  struct Cells {
    W w[values];
  };

  static METAL_FUNC int row_bytes(int k) {
    return k * int(sizeof(W));
  }
  static METAL_FUNC int row_scales(int) {
    return 0;
  }
  static METAL_FUNC int column_bytes(int column) {
    return column * int(sizeof(W));
  }
  static METAL_FUNC int column_scales(int) {
    return 0;
  }
  static METAL_FUNC int whole_blocks(int k) {
    return k / block;
  }

  template <typename From, typename To>
  static METAL_FUNC void load_values(const device From* from, thread To* to) {
    if constexpr (aligned) {
      const vec<From, values> all = *(const device vec<From, values>*)from;
      for (int i = 0; i < values; i++) {
        to[i] = static_cast<To>(all[i]);
      }
    } else {
      for (int i = 0; i < values; i++) {
        to[i] = static_cast<To>(from[i]);
      }
    }
  }
  static METAL_FUNC void load(
      const device uint8_t* w,
      const device uint8_t*,
      const device uint8_t*,
      int,
      thread Cells& cells) {
    load_values((const device W*)w, cells.w);
  }
  static METAL_FUNC void load_safe(
      const device uint8_t* w,
      const device uint8_t*,
      const device uint8_t*,
      int,
      int used,
      thread Cells& cells) {
    const device W* from = (const device W*)w;
    for (int i = 0; i < values; i++) {
      cells.w[i] = i < used ? from[i] : W(0);
    }
  }

  template <typename T>
  static METAL_FUNC float load_x(const device T* x, thread float* x_thread) {
    load_values(x, x_thread);
    return 0;
  }
  template <typename T>
  static METAL_FUNC float
  load_x_safe(const device T* x, int used, thread float* x_thread) {
    for (int i = 0; i < values; i++) {
      x_thread[i] = i < used ? static_cast<float>(x[i]) : 0.0f;
    }
    return 0;
  }

  // The same for values that are the lane's own.
  template <typename T>
  static METAL_FUNC float load_own(const thread T* x, thread float* x_thread) {
    GLM_UNROLL
    for (int i = 0; i < values; i++) {
      x_thread[i] = static_cast<float>(x[i]);
    }
    return 0;
  }

  static METAL_FUNC void dot(
      const thread Cells& cells,
      const thread float* x_thread,
      float,
      thread float& result) {
    for (int i = 0; i < values; i++) {
      result += static_cast<float>(cells.w[i]) * x_thread[i];
    }
  }

  // Gives the weights themselves.
  static METAL_FUNC void decode(const thread Cells& cells, thread float* w) {
    GLM_UNROLL
    for (int i = 0; i < values; i++) {
      w[i] = static_cast<float>(cells.w[i]);
    }
  }

  static METAL_FUNC float total(float sum, const device uint8_t*) {
    return sum;
  }
  static METAL_FUNC float reduce(float result) {
    for (ushort lanes = kLanes / 2; lanes >= 1; lanes >>= 1) {
      result += simd_shuffle_down(result, lanes);
    }
    return result;
  }
};
