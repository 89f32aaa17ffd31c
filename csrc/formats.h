// What a weight matrix is made of, in the vocabulary of MLX's quantized ops.
#pragma once

#include <cstddef>
#include <cstdint>

namespace glm_fused {

enum class Mode : uint8_t { dense, affine, mxfp4, mxfp8, nvfp4 };
enum class FloatType : uint8_t { float32, float16, bfloat16 };

inline size_t size_of(FloatType type) {
  return type == FloatType::float32 ? 4 : 2;
}

// `float_type` is that of the weights (dense) or of scales and biases (affine).
struct Format {
  Mode mode = Mode::dense;
  int bits = 0;
  int group_size = 0;
  FloatType float_type = FloatType::float32;

  size_t row_bytes(int k) const {
    return mode == Mode::dense ? k * size_of(float_type)
                               : static_cast<size_t>(k) * bits / 8;
  }
  size_t scale_bytes() const {
    return mode == Mode::affine ? size_of(float_type) : 1;
  }
  int groups(int k) const {
    return mode == Mode::dense ? 0 : k / group_size;
  }
};

// MLX runs `qmv_fast` on whole tiles of eight rows and 512 columns and `qmv`
// elsewhere; the two give a lane different columns, so their sums differ in
// the last bits. Dense weights know one order.
inline bool uses_fast_order(const Format& format, int n, int k) {
  return format.mode != Mode::dense && n % 8 == 0 && k % 512 == 0;
}

}  // namespace glm_fused
