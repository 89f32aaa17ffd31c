// mxfp4, mxfp8 (a power of two per 32 values) and nvfp4 (an e4m3 scale per 16).
// Planes: weight, scales; for a format with a factor, also global_scale.
#pragma once

#include "formats/decode.h"

namespace glm_fused {

class FpRow {
 public:
  FpRow(const Format& format, const uint8_t* const* planes)
      : format_(format),
        weight_(planes[0]),
        scales_(planes[1]),
        factor_(
            format.spec->plane_count == 3
                ? read_float(planes[2], 0, FloatType::float32)
                : 1) {}

  static int values(const Format& format, bool fast_order) {
    return (fast_order ? 2 : 1) * 32 / format.spec->bits;
  }
  static std::string
  shader(const Format& format, const std::string&, bool fast_order) {
    return "Fp<" + std::to_string(format.spec->block) + ", " +
        std::to_string(format.spec->bits) + ", " +
        (fast_order ? "true" : "false") +
        (format.spec->plane_count == 3 ? ", true>" : ">");
  }

  void add(const float* x, int column, int values, float& result) const {
    const int bits = format_.spec->bits;
    const uint8_t* w = weight_ + static_cast<size_t>(column) * bits / 8;
    const uint8_t code = scales_[column / format_.spec->block];
    const float scale = format_.spec->block == 16 ? e4m3(code) : e8m0(code);
    result =
        result + scale * (bits == 4 ? fp4(w, x, values) : fp8(w, x, values));
  }

  float total(float sum) const {
    return sum * factor_;
  }

  static float e4m3(uint8_t byte) {
    const uint16_t v = byte & 127, sign = (byte & 128) << 8;
    const uint16_t nan = ((v + 1) >> 7) << 14;
    return from_float16(static_cast<uint16_t>(v << 7 | nan | sign)) * 256.0f;
  }

 private:
  static float e8m0(uint8_t byte) {
    return float_of(byte == 0 ? 0x400000u : static_cast<uint32_t>(byte) << 23);
  }

  static float e2m1(int code) {
    static const float magnitude[] = {
        0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
    return code & 8 ? -magnitude[code & 7] : magnitude[code & 7];
  }

  static float fp4(const uint8_t* w, const float* x, int values) {
    float accum = 0;
    for (int v = 0; v < values; v += 4) {
      float ws[4];
      for (int j = 0; j < 4; j++) {
        ws[j] = e2m1(w[(v + j) / 2] >> 4 * (j % 2) & 15);
      }
      accum = accum + four(x + v, ws);
    }
    return accum;
  }

  static float fp8(const uint8_t* w, const float* x, int values) {
    float accum = 0;
    for (int v = 0; v < values; v++) {
      accum = std::fma(x[v], e4m3(w[v]), accum);
    }
    return accum;
  }

  const Format& format_;
  const uint8_t* weight_;
  const uint8_t* scales_;
  float factor_;
};

template <>
struct RowOf<Family::fp> {
  using type = FpRow;
};

}  // namespace glm_fused

#if defined(GLM_DOT_KERNELS)
#include "cpu/dot/dot_body.h"
#include "cpu/dot/group_scales.h"

namespace {

// The value of the e4m3 code in the top byte of every word. NaN, 0x7f and 0xff,
// is as yet a number, 480.
//
// Sign, exponent and mantissa where fp32 has them are the value times 2^-120. A
// subnormal code is a subnormal float then, with which a product takes longer:
// on Zen 4, mxfp8 of random bytes, one in sixteen of which is subnormal, takes
// twice as long on AVX2 as without them, and a third longer on AVX-512.
//
// There is a way round: the code as a normal float, twice that less 2^-6, and
// the smaller of the two. It is half as many instructions again, and takes half
// as long again on AVX2 where no code is subnormal. Scales make the largest of
// a block's weights nearly the largest code, 448, so that some one in ten
// thousand is subnormal: for weights as models have them it would be slower, as
// it would be on AVX-512 for any.
GLM_INLINE F16 e4m3(U16 words) {
  const U16 spread = bits_and(shift_right_signed<4>(words), 0x87f00000u);
  return mul(as_float(spread), splat(0x1p120f));
}

// A scale of mxfp4 and mxfp8, whose byte is as that of all codes the top one:
// 2^(code - 127); 2^-127 is subnormal and written as such.
struct E8M0 {
  static constexpr int kBlock = 32, kByte = 3;
  static constexpr bool kHasFactor = false;
  static GLM_INLINE F16 decode(U16 v) {
    return as_float(max_words(shift_right<1>(v), 0x400000u));
  }
};
struct E4M3 {
  static constexpr int kBlock = 16, kByte = 3;
  static constexpr bool kHasFactor = true;  // of the matrix, or 1
  static GLM_INLINE F16 decode(U16 v) {
    constexpr uint32_t kMagnitude = 0x7fffffffu, kOf480 = 0x43f00000u;
    const U16 value = as_words(e4m3(v));
    return as_float(set_where_equal(value, kMagnitude, kOf480, 0x7f800000u));
  }
};

// result += scale * accum, two roundings: MLX multiplies inside qdot.
template <class Code, int values>
class ByteScales {
 public:
  GLM_INLINE ByteScales(const DotArgs& a, int)
      : scales_(a.planes[1]), spread_(a, values, 1, Code::kByte) {
    if (Code::kHasFactor && a.format.spec->plane_count == 3) {
      memcpy(&factor_, a.planes[2], sizeof(factor_));
    }
  }

  template <int R>
  GLM_INLINE void locate(TileRows& rows, int row, int stride) const {
    const size_t at = static_cast<size_t>(row) * spread_.row_bytes();
    rows.scales = scales_ + at;
    rows.scale_stride = static_cast<ptrdiff_t>(stride) * spread_.row_bytes();
    rows.direct_halves = std::min(
        rows.direct_halves,
        spread_.direct_halves(at + (R - 1) * rows.scale_stride));
  }

  GLM_INLINE void prefetch(const uint8_t* const* planes, int row, int count)
      const {
    spread_.prefetch(planes[1], row, count);
  }

  template <class Do>
  GLM_INLINE void with_reading(const Do& with) const {
    with(InPlace<kHalf * values / Code::kBlock>());
  }

  template <class Reading, int R, int M>
  GLM_INLINE void finish(
      const TileRows& rows,
      int hb,
      const float*,
      const F16 (&acc)[R][M],
      F16 (&result)[R][M]) const {
    if constexpr (Reading::kInPlace) {
      const uint8_t* at = spread_.place(rows.scales, hb);
      const auto read = GLM_EACH(p) {
        return spread_.template whole<Reading::kBytes>(p);
      };
      return add_groups(at, rows.scale_stride, acc, result, read);
    }
    uint8_t edge[R][16];
    ptrdiff_t stride = rows.scale_stride;
    const uint8_t* at =
        spread_.locate(rows.scales, hb, hb < rows.direct_halves, edge, stride);
    const Shuffle& spread = spread_.at(hb);
    const auto read = GLM_EACH(p) {
      return spread(p);
    };
    add_groups(at, stride, acc, result, read);
  }

  GLM_INLINE float total(float sum) const {
    return Code::kHasFactor ? sum * factor_ : sum;
  }

 private:
  template <int R, int M, class Read>
  static GLM_INLINE void add_groups(
      const uint8_t* scales,
      ptrdiff_t stride,
      const F16 (&acc)[R][M],
      F16 (&result)[R][M],
      Read read) {
    unroll<R>(GLM_EACH(r) {
      const F16 s = Code::decode(read(scales + r * stride));
      unroll<M>(
          GLM_EACH(m) { result[r][m] = add(result[r][m], mul(s, acc[r][m])); });
    });
  }

  const uint8_t* scales_;
  const Spread spread_;
  float factor_ = 1;
};

template <bool fast, class Code>
struct Fp4 {
  static constexpr int kValues = fast ? 16 : 8;
  static constexpr int kBytes = kValues / 2;
  static constexpr size_t kHalfBytes = kHalf * kBytes;
  static constexpr int kTerms = kValues;
  static constexpr bool kQuads = true;
  static constexpr bool kCarriesAccumulator = false;
  static constexpr int kSumStep = 0;
  using Words = LaneWords<kBytes>;
  using Scales = ByteScales<Code, kValues>;

  static constexpr Term term(int p) {
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

#if defined(GLM_AVX512) || defined(GLM_AVX2)
  static constexpr bool kDecodesPairs = true;
  UpperTable table{kE2M1};
#endif
#if defined(GLM_AVX512)
  template <int p>
  GLM_INLINE F16 decode(const Words& words) const {
    const U16 both = table(shift_right<4 * (p % 4)>(words.w[p / 8]));
    return upper_half<p % 8 / 4>(both);
  }
#elif defined(GLM_AVX2)
  static constexpr bool kInterleaves = true;
  static constexpr bool kHalvesApart = true;
  template <int p, class Lanes>
  GLM_INLINE auto decode(const Lanes& words) const {
    const auto codes = shift_right<4 * (p % 2)>(words.w[p / 8]);
    const auto both = table.template spread<p % 8 / 4>(codes);
    return upper_half<p % 4 / 2>(both);
  }
#else
  Table16 table{kE2M1};
  template <int p>
  GLM_INLINE F16 decode(const Words& words) const {
    return table(shift_right<4 * (p % 8)>(words.w[p / 8]));
  }
#endif
};

template <bool fast>
struct Fp8 {
  static constexpr int kValues = fast ? 8 : 4;
  static constexpr int kBytes = kValues;
  static constexpr size_t kHalfBytes = kHalf * kBytes;
  static constexpr int kTerms = kValues;
  static constexpr bool kQuads = false;
  static constexpr bool kCarriesAccumulator = false;
  static constexpr int kSumStep = 0;
  using Words = LaneWords<kBytes>;
  using Scales = ByteScales<E8M0, kValues>;

  static constexpr Term term(int p) {
    return {p, p, 0xff, 1.0f, 1.0f};
  }
  template <int p>
  GLM_INLINE F16 decode(const Words& words) const {
    constexpr int word = word_of<Words>(p), byte = p - Words::kStart[word];
    return e4m3(shift_left<24 - 8 * byte>(words.w[word]));
  }
  // A carry out of a byte's seven low bits tells that it is NaN.
  GLM_INLINE F16 with_nan(const Words& words, F16 v) const {
    constexpr int kWords = kBytes / 4;
    U16 carries[kWords];
    unroll<kWords>(GLM_EACH(i) {
      carries[i] = add_words(bits_and(words.w[i], 0x7f7f7f7fu), 0x01010101u);
    });
    const U16 any =
        kWords == 1 ? carries[0] : bits_or(carries[0], carries[kWords - 1]);
    return nan_where(any, 0x80808080u, v);
  }
};

template <>
const Kernel& find_kernel<glm_fused::Family::fp>(
    const glm_fused::Format& format,
    bool fast) {
  if (format.spec->bits == 8) {
    return fast ? kernel<Fp8<true>> : kernel<Fp8<false>>;
  }
  if (format.spec->block == 16) {
    return fast ? kernel<Fp4<true, E4M3>> : kernel<Fp4<false, E4M3>>;
  }
  return fast ? kernel<Fp4<true, E8M0>> : kernel<Fp4<false, E8M0>>;
}

}  // namespace
#endif
