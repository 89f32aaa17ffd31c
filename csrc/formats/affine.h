// MLX's affine formats: 2, 3, 4, 5, 6 or 8 bits, w = scale * q + bias with a
// scale and a bias per group. Planes: weight, scales, biases.
#pragma once

#include "formats/decode.h"

namespace glm_fused {

class AffineRow {
 public:
  AffineRow(const Format& format, const uint8_t* const* planes)
      : format_(format),
        weight_(planes[0]),
        scales_(planes[1]),
        biases_(planes[2]) {}

  static int values(const Format& format, bool fast_order) {
    const int bits = format.spec->bits;
    const int pack = bits == 3 || bits == 5 ? 8 : bits == 6 ? 4 : 32 / bits;
    return fast_order && bits > 2 ? 2 * pack : pack;
  }
  static std::string
  shader(const Format& format, const std::string& floats, bool fast_order) {
    return "Affine<" + floats + ", " + std::to_string(format.spec->block) +
        ", " + std::to_string(format.spec->bits) + ", " +
        (fast_order ? "true>" : "false>");
  }

  void add(const float* x, int column, int values, float& result) const {
    const int bits = format_.spec->bits;
    const uint8_t* w = weight_ + static_cast<size_t>(column) * bits / 8;
    const int group = column / format_.spec->block;
    const float scale = read_float(scales_, group, format_.float_type);
    const float bias = read_float(biases_, group, format_.float_type);
    const float sum = sum_of(x, values, bits);
    result = result + std::fma(scale, dot(w, x, values, bits), sum * bias);
  }

  static float total(float sum) {
    return sum;
  }

  // Values as mx.dequantize makes them on a CPU: the product and the sum are
  // rounded to the scales' type.
  void embedded(int column, int count, float* to) const {
    for (int i = 0; i < count; i++) {
      to[i] = value(column + i);
    }
  }

 private:
  float value(int column) const {
    const int bits = format_.spec->bits, place = column * bits % 8;
    const uint8_t* w = weight_ + static_cast<size_t>(column) * bits / 8;
    const int word = place + bits > 8 ? w[0] | w[1] << 8 : w[0];
    const int code = word >> place & ((1 << bits) - 1);
    const int group = column / format_.spec->block;
    const FloatType type = format_.float_type;
    const float scale = read_float(scales_, group, type);
    const float bias = read_float(biases_, group, type);
    const float scaled = round_to(static_cast<float>(code) * scale, type);
    return round_to(scaled + bias, type);
  }

  // MLX's load_vector: the sum that multiplies the bias.
  static float sum_of(const float* x, int values, int bits) {
    const int step = bits == 8 ? 1 : bits % 2 ? 8 : 4;
    float sum = 0;
    for (int i = 0; i < values; i += step) {
      float part = x[i];
      for (int j = 1; j < step; j++) {
        part = part + x[i + j];
      }
      sum = sum + part;
    }
    return sum;
  }

  // 3, 5 and 6 bits: every byte a column touches adds its own product; x is
  // divided by the place of the column's first bit in its byte.
  static float
  straddling(const uint8_t* w, const float* x, int values, int bits) {
    float accum = 0;
    for (int v = 0; v < values; v++) {
      const int bit = v * bits, byte = bit / 8, place = bit % 8;
      const float scaled = x[v] / static_cast<float>(1 << place);
      const int mask = ((1 << bits) - 1) << place;
      accum = std::fma(static_cast<float>(w[byte] & mask), scaled, accum);
      if (mask > 255) {
        const auto carry = static_cast<float>(w[byte + 1] & mask >> 8);
        accum = std::fma(carry, scaled * 256.0f, accum);
      }
    }
    return accum;
  }

  static float dot(const uint8_t* w, const float* x, int values, int bits) {
    float accum = 0;
    if (bits == 8) {
      for (int v = 0; v < values; v++) {
        accum = std::fma(x[v], static_cast<float>(w[v]), accum);
      }
      return accum;
    }
    if (bits != 2 && bits != 4) {
      return straddling(w, x, values, bits);
    }
    for (int v = 0; v < values; v += 4) {
      const int bytes =
          w[v * bits / 8] | (bits == 4 ? w[v * bits / 8 + 1] << 8 : 0);
      float xs[4], ws[4];
      for (int j = 0; j < 4; j++) {
        const int place = bits * j;
        xs[j] = x[v + j] / static_cast<float>(1 << place);
        ws[j] = static_cast<float>(bytes & ((1 << bits) - 1) << place);
      }
      accum = accum + four(xs, ws);
    }
    return accum;
  }

  const Format& format_;
  const uint8_t* weight_;
  const uint8_t* scales_;
  const uint8_t* biases_;
};

template <>
struct RowOf<Family::affine> {
  using type = AffineRow;
};

}  // namespace glm_fused

#if defined(GLM_DOT_KERNELS)
#include "cpu/dot/affine_scales.h"
#include "cpu/dot/dot_body.h"

namespace {

// Terms of eight (3, 5 bits) or four (6 bits) columns, as in MLX's qdot.
constexpr Term kTerms3[] = {
    {0, 0, 0x07, 1.0f, 1.0f},
    {1, 0, 0x38, 1 / 8.0f, 1.0f},
    {2, 0, 0xc0, 1 / 64.0f, 1.0f},
    {2, 1, 0x01, 1 / 64.0f, 256.0f},
    {3, 1, 0x0e, 1 / 2.0f, 1.0f},
    {4, 1, 0x70, 1 / 16.0f, 1.0f},
    {5, 1, 0x80, 1 / 128.0f, 1.0f},
    {5, 2, 0x03, 1 / 128.0f, 256.0f},
    {6, 2, 0x1c, 1 / 4.0f, 1.0f},
    {7, 2, 0xe0, 1 / 32.0f, 1.0f},
};
constexpr Term kTerms5[] = {
    {0, 0, 0x1f, 1.0f, 1.0f},
    {1, 0, 0xe0, 1 / 32.0f, 1.0f},
    {1, 1, 0x03, 1 / 32.0f, 256.0f},
    {2, 1, 0x7c, 1 / 4.0f, 1.0f},
    {3, 1, 0x80, 1 / 128.0f, 1.0f},
    {3, 2, 0x0f, 1 / 128.0f, 256.0f},
    {4, 2, 0xf0, 1 / 16.0f, 1.0f},
    {4, 3, 0x01, 1 / 16.0f, 256.0f},
    {5, 3, 0x3e, 1 / 2.0f, 1.0f},
    {6, 3, 0xc0, 1 / 64.0f, 1.0f},
    {6, 4, 0x07, 1 / 64.0f, 256.0f},
    {7, 4, 0xf8, 1 / 8.0f, 1.0f},
};
constexpr Term kTerms6[] = {
    {0, 0, 0x3f, 1.0f, 1.0f},
    {1, 0, 0xc0, 1 / 64.0f, 1.0f},
    {1, 1, 0x0f, 1 / 64.0f, 256.0f},
    {2, 1, 0xf0, 1 / 16.0f, 1.0f},
    {2, 2, 0x03, 1 / 16.0f, 256.0f},
    {3, 2, 0xfc, 1 / 4.0f, 1.0f},
};

template <int bits>
constexpr int affine_pack = bits == 3 || bits == 5 ? 8
    : bits == 6                                    ? 4
                                                   : 32 / bits;

template <int bits>
constexpr Term affine_term(int p) {
  if constexpr (bits == 3 || bits == 5 || bits == 6) {
    constexpr int n = bits == 3 ? 10 : bits == 5 ? 12 : 6;
    const Term t = bits == 3 ? kTerms3[p % n]
        : bits == 5          ? kTerms5[p % n]
                             : kTerms6[p % n];
    const int pack = p / n;
    return {
        t.value + pack * affine_pack<bits>,
        t.byte + pack * affine_pack<bits> * bits / 8,
        t.mask,
        t.scale,
        t.carry};
  } else {
    // MLX cuts 2-bit quads from a byte, 4-bit quads from two, 8-bit ones whole.
    const int shift = bits == 8 ? 0 : bits * (p % 4);
    return {
        p,
        bits == 4 ? p / 4 * 2 : p * bits / 8,
        ((1u << bits) - 1) << shift,
        1.0f / static_cast<float>(1 << shift),
        1.0f};
  }
}

// The floats of i & mask for every mask of four bits.
struct MaskedFloats {
  float of[16][16];
};
constexpr MaskedFloats kMasked = [] {
  MaskedFloats made{};
  for (int mask = 0; mask < 16; mask++) {
    for (int i = 0; i < 16; i++) {
      made.of[mask][i] = static_cast<float>(i & mask);
    }
  }
  return made;
}();

template <int bits, bool fast>
struct Affine {
  static constexpr int kPacks = fast && bits > 2 ? 2 : 1;
  static constexpr int kValues = affine_pack<bits> * kPacks;
  static constexpr int kBytes = kValues * bits / 8;
  static constexpr size_t kHalfBytes = kHalf * kBytes;
  static constexpr int kTerms = bits == 3 ? kValues * 10 / 8
      : bits == 5                         ? kValues * 12 / 8
      : bits == 6                         ? kValues * 6 / 4
                                          : kValues;
  static constexpr bool kQuads = bits == 2 || bits == 4;
  static constexpr bool kCarriesAccumulator = false;
  static constexpr bool kHalvesApart = kTerms > kValues;
  static constexpr bool kJoinsRows = !fast;  // rows and groups have no gaps
  static constexpr int kSumStep = bits == 8 ? 1 : bits % 2 ? 8 : 4;
  using Words = LaneWords<kBytes>;
  using Scales = AffineScales<kValues>;

  static constexpr Term term(int p) {
    return affine_term<bits>(p);
  }

  template <int p, class Lanes>
  GLM_INLINE auto decode(const Lanes& words) const {
    constexpr Term t = term(p);
#if defined(GLM_AVX512)
    if constexpr (t.mask < 16) {
      return Table16(kMasked.of[t.mask])(from_byte<t.byte>(words));
    }
#endif
    return to_float(bits_and(from_byte<t.byte>(words), t.mask));
  }
};

template <int bits>
const Kernel& find_affine([[maybe_unused]] bool fast) {
  if constexpr (Affine<bits, true>::kPacks == 1) {  // both orders are the same
    return kernel<Affine<bits, false>>;
  } else {
    return fast ? kernel<Affine<bits, true>> : kernel<Affine<bits, false>>;
  }
}

template <>
const Kernel& find_kernel<glm_fused::Family::affine>(
    const glm_fused::Format& format,
    bool fast) {
  switch (format.spec->bits) {
    case 2:
      return find_affine<2>(fast);
    case 3:
      return find_affine<3>(fast);
    case 4:
      return find_affine<4>(fast);
    case 5:
      return find_affine<5>(fast);
    case 6:
      return find_affine<6>(fast);
    default:
      return find_affine<8>(fast);
  }
}

}  // namespace
#endif
