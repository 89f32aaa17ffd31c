// How values become the codes of packed rows (csrc/row_layout.h), one text for
// the shaders and the CPU. The includer brings bits_of and float_of.
#pragma once

namespace glm_fused {

// Values are stored as these times a scale, which is their largest magnitude
// over `most`. `code` rounds to the nearest, to even among two.
struct Fp8Packing {
  static inline float most() {
    return 448.0f;
  }

  // e4m3; what is beyond 448, and NaN, is 448.
  static inline unsigned char code(float value) {
    const unsigned all = bits_of(value);
    const unsigned sign = all & 0x80000000u, magnitude = all ^ sign;
    unsigned found = 0x7eu;
    if (magnitude < (121u << 23)) {  // subnormal: let fp32 addition round
      const unsigned shift = 141u << 23;
      found = bits_of(float_of(magnitude) + float_of(shift)) - shift;
    } else if (magnitude < (543u << 21)) {
      const unsigned odd = magnitude >> 20 & 1u;
      found = (magnitude - (120u << 23) + 0x7ffffu + odd) >> 20;
    }
    return static_cast<unsigned char>(found | sign >> 24);
  }
};

struct Int8Packing {
  static inline float most() {
    return 127.0f;
  }

  // Two's complement; `value` is from -127.4 to 127.4.
  static inline unsigned char code(float value) {
    return static_cast<unsigned char>(
        bits_of(value + 12582912.0f));  // 1.5 << 23
  }
};

}  // namespace glm_fused
