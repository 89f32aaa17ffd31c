// Group scales, spread over the lanes that use them.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace {

using glm_fused::FloatType;
using glm_fused::cpu::DotArgs;

// The groups of one half-block: where they start in a row, and how many of
// the sixteen values loaded there belong to it.
struct Groups {
  int first;
#if defined(GLM_AVX512)
  __mmask16 mask;
#else
  int count;
#endif
};

// Which lane uses which of the groups.
struct Spread {
  int log2_lanes; // lanes per group, a power of two
  int groups; // in the whole row
#if defined(GLM_AVX512)
  __m512i index;
#endif

  GLM_INLINE Spread(const DotArgs& a, int values)
      : log2_lanes(__builtin_ctz(a.format.group_size / values)),
        groups(a.k / a.format.group_size) {
#if defined(GLM_AVX512)
    alignas(64) int at[kHalf];
    for (int lane = 0; lane < kHalf; lane++) {
      at[lane] = lane >> log2_lanes;
    }
    index = _mm512_load_si512(at);
#endif
  }

  GLM_INLINE Groups of(int half_block) const {
    const int first = half_block * kHalf >> log2_lanes;
    const int whole = (kHalf + (1 << log2_lanes) - 1) >> log2_lanes;
    const int left = groups - first;
    const int count = left < whole ? left : whole;
#if defined(GLM_AVX512)
    return {first, static_cast<__mmask16>((1u << count) - 1)};
#else
    return {first, count};
#endif
  }
  GLM_INLINE F16 operator()(F16 v) const {
#if defined(GLM_AVX512)
    return _mm512_permutexvar_ps(index, v);
#else
    float in[kHalf], out[kHalf];
    store(in, v);
    for (int lane = 0; lane < kHalf; lane++) {
      out[lane] = in[lane >> log2_lanes];
    }
    return load(out);
#endif
  }
};

// The groups' values of `size` bytes, zero-extended to words; the rest zero.
template <int size>
GLM_INLINE U16 load_few(const uint8_t* p, Groups g) {
#if defined(GLM_AVX512)
  if constexpr (size == 4) {
    return _mm512_maskz_loadu_epi32(g.mask, p);
  } else if constexpr (size == 2) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(g.mask, p));
  } else {
    return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(g.mask, p));
  }
#else
  uint32_t words[kHalf] = {};
  for (int i = 0; i < g.count; i++) {
    memcpy(&words[i], p + i * size, size); // little-endian
  }
  return load_words(words);
#endif
}

GLM_INLINE F16 load_floats(const uint8_t* p, Groups g, FloatType type) {
  if (type == FloatType::bfloat16) {
    return as_float(shift_left<16>(load_few<2>(p, g)));
  }
  if (type == FloatType::float16) {
    return half_to_float(load_few<2>(p, g));
  }
  return as_float(load_few<4>(p, g));
}

// result += fma(scale, accum, sum * bias), as `scale * accum + sum * bias`
// contracts; the sums follow the planes of packed x.
struct AffineScales {
  const uint8_t* scales;
  const uint8_t* biases;
  const FloatType type;
  const int size;
  const Spread spread;

  GLM_INLINE AffineScales(const DotArgs& a, int values)
      : scales(a.scales),
        biases(a.biases),
        type(a.format.float_type),
        size(type == FloatType::float32 ? 4 : 2),
        spread(a, values) {}
  GLM_INLINE Groups groups(int half_block) const {
    return spread.of(half_block);
  }

  template <int M>
  GLM_INLINE void finish(
      int row,
      Groups g,
      const float* sums,
      const F16 (&acc)[M],
      F16 (&result)[M]) const {
    const size_t at = static_cast<size_t>(row) * spread.groups + g.first;
    const F16 s = spread(load_floats(scales + at * size, g, type));
    const F16 b = spread(load_floats(biases + at * size, g, type));
    unroll<M>(GLM_EACH(m) {
      const F16 sum = load(sums + m * kHalf);
      result[m] = add(result[m], fma(s, acc[m], mul(sum, b)));
    });
  }
};

// result += scale * accum, two roundings: MLX multiplies inside qdot.
template <class Decode>
struct ByteScales {
  const uint8_t* scales;
  const Spread spread;

  GLM_INLINE ByteScales(const DotArgs& a, int values)
      : scales(a.scales), spread(a, values) {}
  GLM_INLINE Groups groups(int half_block) const {
    return spread.of(half_block);
  }

  template <int M>
  GLM_INLINE void finish(
      int row,
      Groups g,
      const float*,
      const F16 (&acc)[M],
      F16 (&result)[M]) const {
    const size_t at = static_cast<size_t>(row) * spread.groups + g.first;
    const F16 s = spread(Decode()(load_few<1>(scales + at, g)));
    unroll<M>(GLM_EACH(m) { result[m] = add(result[m], mul(s, acc[m])); });
  }
};

struct DecodeE8M0 {
  GLM_INLINE F16 operator()(U16 v) const {
    // 2^-127 is subnormal and written as such; every other code is exponent.
#if defined(GLM_AVX512)
    const __mmask16 lowest = _mm512_testn_epi32_mask(v, v);
    return as_float(_mm512_mask_blend_epi32(
        lowest, shift_left<23>(v), _mm512_set1_epi32(0x400000)));
#else
    uint32_t w[kHalf];
    memcpy(w, &v, sizeof(w));
    for (auto& e : w) {
      e = e == 0 ? 0x400000u : e << 23;
    }
    return as_float(load_words(w));
#endif
  }
};
struct DecodeE4M3 {
  GLM_INLINE F16 operator()(U16 v) const {
    return e4m3_to_float(v);
  }
};
using E8M0Scales = ByteScales<DecodeE8M0>;
using E4M3Scales = ByteScales<DecodeE4M3>;

struct NoScales {
  GLM_INLINE NoScales(const DotArgs&, int) {}
  GLM_INLINE Groups groups(int) const {
    return {};
  }

  template <int M>
  GLM_INLINE void finish(
      int,
      Groups,
      const float*,
      const F16 (&acc)[M],
      F16 (&result)[M]) const {
    unroll<M>(GLM_EACH(m) { result[m] = acc[m]; });
  }
};

} // namespace
