// GGUF's blocks, whose scales lie among the codes: `Block` is one of
// gguf_blocks.h or gguf_codebooks.h. A lane's sum of products with codes is
// multiplied by its scale and added to the result.
#pragma once

#include "numbers.h"

#define GLM_BLOCK METAL_FUNC

namespace gguf {

using glm_fused::float_of;

METAL_FUNC float half_value(uint bits) {
  return static_cast<float>(as_type<half>(static_cast<uint16_t>(bits)));
}

}  // namespace gguf

#include "formats/gguf_blocks.h"
#include "formats/gguf_codebook_grids.h"
#include "formats/gguf_codebooks.h"

template <typename Block, bool whole>
struct Gguf {
  typedef uint8_t scale_type;

  GLM_CONST int values = gguf::kLaneColumns;
  GLM_CONST int block = values * kLanes;
  GLM_CONST int scale_rows = 1;          // that share their scales
  GLM_CONST bool whole_tiles = whole;    // n % 8 == 0, k % 512 == 0
  GLM_CONST bool factors = false;        // `biases` is one factor a matrix
  GLM_CONST bool partial_lanes = false;  // a row ends between lanes

  struct Cells {
    int8_t q[values];
    float scale;
    float bias;
  };

  static METAL_FUNC int row_bytes(int k) {
    return k / Block::columns * Block::bytes;
  }
  static METAL_FUNC int row_scales(int) {
    return 0;
  }
  static METAL_FUNC int column_bytes(int column) {
    return column / Block::columns * Block::bytes;
  }
  static METAL_FUNC int column_scales(int) {
    return 0;
  }
  static METAL_FUNC int whole_blocks(int k) {
    return k / block;
  }

  static METAL_FUNC void load(
      const device uint8_t* w,
      const device uint8_t*,
      const device uint8_t*,
      int column,
      thread Cells& cells) {
    const int lane = column % Block::columns / values;
    thread int8_t* q = cells.q;
    Block::codes(w, lane, q);
    cells.scale = Block::scale(w, lane);
    cells.bias = Block::bias(w, lane);
  }

  // Returns the sum that multiplies the bias.
  template <typename X>
  static METAL_FUNC float take(X x, thread float* x_thread) {
    float sum = 0;
    GLM_UNROLL
    for (int i = 0; i < values; i += 4) {
      for (int j = i; j < i + 4; j++) {
        x_thread[j] = static_cast<float>(x[j]);
      }
      sum +=
          ((x_thread[i] + x_thread[i + 1]) + x_thread[i + 2]) + x_thread[i + 3];
    }
    return sum;
  }
  template <typename T>
  static METAL_FUNC float load_x(const device T* x, thread float* x_thread) {
    return take(x, x_thread);
  }

  // The same for values that are the lane's own.
  template <typename T>
  static METAL_FUNC float load_own(const thread T* x, thread float* x_thread) {
    return take(x, x_thread);
  }

  static METAL_FUNC void dot(
      const thread Cells& cells,
      const thread float* x_thread,
      float sum,
      thread float& result) {
    float accum = 0;
    for (int i = 0; i < values; i++) {
      accum = fma(static_cast<float>(cells.q[i]), x_thread[i], accum);
    }
    if constexpr (Block::biased) {
      const float offset = glm_fused::product(sum, cells.bias);
      result += fma(accum, cells.scale, offset);
    } else {
      result = fma(accum, cells.scale, result);
    }
  }

  // Gives the weights themselves.
  static METAL_FUNC void decode(const thread Cells& cells, thread float* w) {
    GLM_UNROLL
    for (int i = 0; i < values; i++) {
      w[i] = fma(cells.scale, static_cast<float>(cells.q[i]), cells.bias);
    }
  }

  static METAL_FUNC float total(float sum, const device uint8_t*) {
    return sum;
  }
  static METAL_FUNC float reduce(float result) {
    return simd_sum(result);
  }
};
