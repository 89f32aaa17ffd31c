// Per format: how a lane's bytes become fp32 values, plane by plane.
//
// A simdgroup's 32 lanes each own `kValues` consecutive columns of a block.
// A plane is one term of the lane's dot product taken over all lanes: the
// column it multiplies, the byte and mask it is cut from, and the factor MLX
// moves from the masked weight to x. Columns whose bits straddle two bytes
// have two planes.
#pragma once

#include "cpu/runtime/simd.h"
#include "formats.h"

namespace {

using glm_fused::FloatType;

struct Plane {
  int value;
  int byte;
  uint32_t mask;
  float scale;  // x_thread[value] = x * scale …
  float carry;  // … * carry, for the second byte of a straddling column
};

// Terms of eight (3, 5 bits) or four (6 bits) columns, as in MLX's qdot.
constexpr Plane kPlanes3[] = {
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
constexpr Plane kPlanes5[] = {
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
constexpr Plane kPlanes6[] = {
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
constexpr Plane affine_plane(int p) {
  if constexpr (bits == 3 || bits == 5 || bits == 6) {
    constexpr int n = bits == 3 ? 10 : bits == 5 ? 12 : 6;
    const Plane t = bits == 3 ? kPlanes3[p % n]
        : bits == 5           ? kPlanes5[p % n]
                              : kPlanes6[p % n];
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

template <int bytes>
struct LaneWords;

// The 32-bit words a lane's bytes are cut from; word w starts at byte kStart.
template <>
struct LaneWords<3> {
  static constexpr int kStart[] = {0};
  U16 w[1];
  GLM_INLINE void load(const uint8_t* p) {
    w[0] = load_strided<3>(p);
  }
};
template <>
struct LaneWords<4> {
  static constexpr int kStart[] = {0};
  U16 w[1];
  GLM_INLINE void load(const uint8_t* p) {
    w[0] = load_words(p);
  }
};
template <>
struct LaneWords<5> {
  static constexpr int kStart[] = {0, 1};
  U16 w[2];
  GLM_INLINE void load(const uint8_t* p) {
    w[0] = load_strided<5>(p);
    w[1] = load_strided<5>(p + 1);
  }
};
template <>
struct LaneWords<6> {
  static constexpr int kStart[] = {0, 2};
  U16 w[2];
  GLM_INLINE void load(const uint8_t* p) {
    w[0] = load_strided<6>(p);
    w[1] = load_strided<6>(p + 2);
  }
};
template <>
struct LaneWords<8> {
  static constexpr int kStart[] = {0, 4};
  U16 w[2];
  GLM_INLINE void load(const uint8_t* p) {
    load_pairs(p, w[0], w[1]);
  }
};
template <>
struct LaneWords<10> {
  static constexpr int kStart[] = {0, 4, 6};
  U16 w[3];
  GLM_INLINE void load(const uint8_t* p) {
    w[0] = load_strided<10>(p);
    w[1] = load_strided<10>(p + 4);
    w[2] = load_strided<10>(p + 6);
  }
};

template <class Words>
constexpr int word_of(int byte) {
  int word = 0;
  while (byte >= Words::kStart[word] + 4) {
    word++;
  }
  return word;
}

template <int byte, class Words>
GLM_INLINE U16 from_byte(const Words& words) {
  constexpr int word = word_of<Words>(byte);
  return shift_right<8 * (byte - Words::kStart[word])>(words.w[word]);
}

template <int bits, bool fast>
struct Affine {
  static constexpr int kPacks = fast && bits > 2 ? 2 : 1;
  static constexpr int kValues = affine_pack<bits> * kPacks;
  static constexpr int kBytes = kValues * bits / 8;
  static constexpr int kTerms = bits == 3 ? kValues * 10 / 8
      : bits == 5                         ? kValues * 12 / 8
      : bits == 6                         ? kValues * 6 / 4
                                          : kValues;
  static constexpr bool kQuads = bits == 2 || bits == 4;
  static constexpr bool kCarriesAccumulator = false;
  static constexpr int kSumStep = bits == 8 ? 1 : bits % 2 ? 8 : 4;
  using Words = LaneWords<kBytes>;

  static constexpr Plane plane(int p) {
    return affine_plane<bits>(p);
  }

#if defined(GLM_AVX512)
  Table16 nibbles[4];
  GLM_INLINE Affine() : nibbles{table(1), table(16), table(256), table(4096)} {}
  static GLM_INLINE Table16 table(float unit) {
    float v[16];
    for (int i = 0; i < 16; i++) {
      v[i] = unit * static_cast<float>(i);
    }
    return Table16(v);
  }
#endif

  template <int p>
  GLM_INLINE F16 decode(const Words& words) const {
    constexpr Plane t = plane(p);
#if defined(GLM_AVX512)
    if constexpr (bits == 4) {
      return nibbles[p % 4](shift_right<4 * (p % 8)>(words.w[p / 8]));
    }
#endif
    return to_float(bits_and(from_byte<t.byte>(words), t.mask));
  }
};

template <bool fast>
struct Fp4 {
  static constexpr int kValues = fast ? 16 : 8;
  static constexpr int kBytes = kValues / 2;
  static constexpr int kTerms = kValues;
  static constexpr bool kQuads = true;
  static constexpr bool kCarriesAccumulator = false;
  static constexpr int kSumStep = 0;
  using Words = LaneWords<kBytes>;

  static constexpr Plane plane(int p) {
    return {p, p / 2, 0, 1.0f, 1.0f};
  }
  static constexpr float kE2M1[16] = {
      0.0f,
      0.5f,
      1.0f,
      1.5f,
      2.0f,
      3.0f,
      4.0f,
      6.0f,
      -0.0f,
      -0.5f,
      -1.0f,
      -1.5f,
      -2.0f,
      -3.0f,
      -4.0f,
      -6.0f};
  Table16 table{kE2M1};

  template <int p>
  GLM_INLINE F16 decode(const Words& words) const {
    return table(shift_right<4 * (p % 8)>(words.w[p / 8]));
  }
};

// e4m3 as MLX reads it: through half precision, NaN for 0x7f and 0xff.
GLM_INLINE F16 e4m3_to_float(U16 bytes) {
  const U16 magnitude = bits_and(bytes, 0x7f);
  const U16 nan = shift_left<14>(shift_right<7>(add_words(magnitude, 1)));
  const U16 sign = shift_left<8>(bits_and(bytes, 0x80));
  const U16 half = bits_or(bits_or(shift_left<7>(magnitude), nan), sign);
  return mul(half_to_float(half), splat(256.0f));
}

template <bool fast>
struct Fp8 {
  static constexpr int kValues = fast ? 8 : 4;
  static constexpr int kBytes = kValues;
  static constexpr int kTerms = kValues;
  static constexpr bool kQuads = false;
  static constexpr bool kCarriesAccumulator = false;
  static constexpr int kSumStep = 0;
  using Words = LaneWords<kBytes>;

  static constexpr Plane plane(int p) {
    return {p, p, 0xff, 1.0f, 1.0f};
  }
  template <int p>
  GLM_INLINE F16 decode(const Words& words) const {
    return e4m3_to_float(bits_and(from_byte<p>(words), 0xff));
  }
};

template <FloatType type>
struct DenseWords : LaneWords<8> {};
template <>
struct DenseWords<FloatType::float32> {
  F16 v[4];
  GLM_INLINE void load(const uint8_t* p) {
    load_quads(p, v);
  }
};

// Dense rows in the order of MLX's gemv: four columns a lane, one running sum.
template <FloatType type>
struct Dense {
  static constexpr int kValues = 4;
  static constexpr int kBytes = type == FloatType::float32 ? 16 : 8;
  static constexpr int kTerms = 4;
  static constexpr bool kQuads = false;
  static constexpr bool kCarriesAccumulator = true;
  static constexpr int kSumStep = 0;
  using Words = DenseWords<type>;

  static constexpr Plane plane(int p) {
    return {p, 0, 0, 1.0f, 1.0f};
  }
  template <int p>
  GLM_INLINE F16 decode(const Words& words) const {
    if constexpr (type == FloatType::float32) {
      return words.v[p];
    } else if constexpr (type == FloatType::float16) {
      return half_to_float(shift_right<16 * (p % 2)>(words.w[p / 2]));
    } else if constexpr (p % 2 == 0) {
      return as_float(shift_left<16>(words.w[p / 2]));
    } else {
      return as_float(bits_and(words.w[p / 2], 0xffff0000u));
    }
  }
};

}  // namespace
