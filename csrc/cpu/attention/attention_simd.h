// The functions that the long-context kernels need beyond simd.h.
#pragma once

#include "cpu/runtime/simd.h"

namespace {

#if defined(GLM_AVX512)

GLM_INLINE F16 sub(F16 a, F16 b) {
  return _mm512_sub_ps(a, b);
}
GLM_INLINE F16 div(F16 a, F16 b) {
  return _mm512_div_ps(a, b);
}
// a > b ? a : b, so a NaN in a never wins.
GLM_INLINE F16 larger(F16 a, F16 b) {
  return _mm512_max_ps(a, b);
}
// a < 0 ? 0 : a, so a NaN stays one.
GLM_INLINE F16 relu(F16 a) {
  return _mm512_max_ps(_mm512_setzero_ps(), a);
}
GLM_INLINE void store_words(uint32_t* p, U16 a) {
  _mm512_storeu_si512(p, a);
}
GLM_INLINE U16 add_words(U16 a, U16 b) {
  return _mm512_add_epi32(a, b);
}
// x >= low ? a : x < low ? 0 : x
GLM_INLINE F16 zero_below(F16 a, F16 x, float low) {
  const __m512 limit = _mm512_set1_ps(low);
  const __mmask16 keep = _mm512_cmp_ps_mask(x, limit, _CMP_GE_OQ);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_mask_mov_ps(_mm512_maskz_mov_ps(keep, a), nan, x);
}
// Returns words that compare as the floats do, with -0 as 0 and NaN as
// -infinity.
GLM_INLINE U16 ordered(F16 a) {
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  a = _mm512_mask_mov_ps(a, nan, _mm512_set1_ps(-__builtin_inff()));
  const __m512i u = as_words(_mm512_add_ps(a, _mm512_setzero_ps()));
  const __m512i flip =
      _mm512_or_si512(_mm512_srai_epi32(u, 31), _mm512_set1_epi32(INT32_MIN));
  return _mm512_xor_si512(u, flip);
}
GLM_INLINE U16 load_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
GLM_INLINE U16 load_shorts(const uint8_t* p) {
  return _mm512_cvtepu16_epi32(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
GLM_INLINE F16 load_halves(const uint8_t* p) {
  return _mm512_cvtph_ps(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// Converts the IEEE half in the lower and that in the upper part of each word.
GLM_INLINE void split_halves(U16 words, F16& low, F16& high) {
  const __m512i order = _mm512_set_epi32(
      0x1f001d,
      0x1b0019,
      0x170015,
      0x130011,
      0xf000d,
      0xb0009,
      0x70005,
      0x30001,
      0x1e001c,
      0x1a0018,
      0x160014,
      0x120010,
      0xe000c,
      0xa0008,
      0x60004,
      0x20000);
  const __m512i v = _mm512_permutexvar_epi16(order, words);
  low = _mm512_cvtph_ps(_mm512_castsi512_si256(v));
  high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, 1));
}
// Sets to[c] to word c of each of 16 rows, which lie `stride` bytes apart.
GLM_INLINE void
transpose_words(const uint8_t* rows, size_t stride, U16 to[16]) {
  const uint8_t* fourth[] = {
      rows, rows + 4 * stride, rows + 8 * stride, rows + 12 * stride};
  __m512i a[16], b[16];
  // A register holds quarters of four rows, so that two unpacks finish a 4 x 4.
  unroll_each<16>(GLM_EACH(i) {
    const int quarter = i / 4, row = i % 4;
    const auto words = [&](int r) {
      return _mm_loadu_si128(
          reinterpret_cast<const __m128i*>(
              fourth[r] + row * stride + 16 * quarter));
    };
    __m512i v = _mm512_castsi128_si512(words(0));
    v = _mm512_inserti32x4(v, words(1), 1);
    v = _mm512_inserti32x4(v, words(2), 2);
    a[i] = _mm512_inserti32x4(v, words(3), 3);
  });
  unroll_each<4>(GLM_EACH(q) {
    const __m512i* x = a + 4 * q;
    b[4 * q] = _mm512_unpacklo_epi32(x[0], x[1]);
    b[4 * q + 1] = _mm512_unpackhi_epi32(x[0], x[1]);
    b[4 * q + 2] = _mm512_unpacklo_epi32(x[2], x[3]);
    b[4 * q + 3] = _mm512_unpackhi_epi32(x[2], x[3]);
  });
  unroll_each<4>(GLM_EACH(q) {
    const __m512i* x = b + 4 * q;
    to[4 * q] = _mm512_unpacklo_epi64(x[0], x[2]);
    to[4 * q + 1] = _mm512_unpackhi_epi64(x[0], x[2]);
    to[4 * q + 2] = _mm512_unpacklo_epi64(x[1], x[3]);
    to[4 * q + 3] = _mm512_unpackhi_epi64(x[1], x[3]);
  });
}
// Packs the words of `a` whose bits in `keep` are set to `to`, where 16 words
// may be written. Returns how many there are.
GLM_INLINE int pack_words(U16 a, uint32_t keep, void* to) {
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(keep, a));
  return __builtin_popcount(keep);
}
GLM_INLINE uint32_t above(U16 a, uint32_t limit) {
  return _mm512_cmpgt_epu32_mask(a, _mm512_set1_epi32(static_cast<int>(limit)));
}
GLM_INLINE uint32_t equal_to(U16 a, uint32_t word) {
  return _mm512_cmpeq_epi32_mask(a, _mm512_set1_epi32(static_cast<int>(word)));
}
GLM_INLINE U16 ascending(int first) {
  const __m512i steps =
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_add_epi32(steps, _mm512_set1_epi32(first));
}

#elif defined(GLM_AVX2)

GLM_INLINE F16 sub(F16 x, F16 y) {
  return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
}
GLM_INLINE F16 div(F16 x, F16 y) {
  return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
}
GLM_INLINE F16 larger(F16 x, F16 y) {
  return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)};
}
GLM_INLINE F16 relu(F16 x) {
  const __m256 none = _mm256_setzero_ps();
  return {_mm256_max_ps(none, x.a), _mm256_max_ps(none, x.b)};
}
GLM_INLINE void store_words(uint32_t* p, U16 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.b);
}
GLM_INLINE U16 add_words(U16 x, U16 y) {
  return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}
GLM_INLINE F16 zero_below(F16 v, F16 x, float low) {
  const auto half = [low](__m256 value, __m256 at) {
    const __m256 keep = _mm256_cmp_ps(at, _mm256_set1_ps(low), _CMP_GE_OQ);
    const __m256 nan = _mm256_cmp_ps(at, at, _CMP_UNORD_Q);
    return _mm256_blendv_ps(_mm256_and_ps(keep, value), at, nan);
  };
  return {half(v.a, x.a), half(v.b, x.b)};
}
GLM_INLINE U16 ordered(F16 v) {
  const auto half = [](__m256 a) {
    const __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
    a = _mm256_blendv_ps(a, _mm256_set1_ps(-__builtin_inff()), nan);
    const __m256i u =
        _mm256_castps_si256(_mm256_add_ps(a, _mm256_setzero_ps()));
    const __m256i flip =
        _mm256_or_si256(_mm256_srai_epi32(u, 31), _mm256_set1_epi32(INT32_MIN));
    return _mm256_xor_si256(u, flip);
  };
  return {half(v.a), half(v.b)};
}
GLM_INLINE U16 load_bytes(const uint8_t* p) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))};
}
GLM_INLINE U16 load_shorts(const uint8_t* p) {
  const auto* q = reinterpret_cast<const __m128i*>(p);
  return {
      _mm256_cvtepu16_epi32(_mm_loadu_si128(q)),
      _mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1))};
}
GLM_INLINE F16 load_halves(const uint8_t* p) {
  const auto* q = reinterpret_cast<const __m128i*>(p);
  return {
      _mm256_cvtph_ps(_mm_loadu_si128(q)),
      _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
GLM_INLINE void split_halves(U16 words, F16& low, F16& high) {
  const auto half = [](__m256i v, __m256& even, __m256& odd) {
    const __m256i order = _mm256_broadcastsi128_si256(
        _mm_set_epi32(0x0f0e0b0a, 0x07060302, 0x0d0c0908, 0x05040100));
    v = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(v, order), 0xd8);
    even = _mm256_cvtph_ps(_mm256_castsi256_si128(v));
    odd = _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1));
  };
  half(words.a, low.a, high.a);
  half(words.b, low.b, high.b);
}
GLM_INLINE void
transpose_words(const uint8_t* rows, size_t stride, U16 to[16]) {
  for (int c = 0; c < 16; c += 4) {  // four columns
    __m256i out[2][4];
    for (int g = 0; g < 2; g++) {  // eight rows
      __m256 a[4];
      for (int r = 0; r < 4; r++) {
        const auto words = [&](int row) {
          return _mm_loadu_ps(
              reinterpret_cast<const float*>(rows + row * stride + 4 * c));
        };
        a[r] = _mm256_insertf128_ps(
            _mm256_castps128_ps256(words(8 * g + r)), words(8 * g + r + 4), 1);
      }
      const __m256 x = _mm256_unpacklo_ps(a[0], a[1]);
      const __m256 y = _mm256_unpackhi_ps(a[0], a[1]);
      const __m256 z = _mm256_unpacklo_ps(a[2], a[3]);
      const __m256 w = _mm256_unpackhi_ps(a[2], a[3]);
      out[g][0] = _mm256_castps_si256(_mm256_shuffle_ps(x, z, 0x44));
      out[g][1] = _mm256_castps_si256(_mm256_shuffle_ps(x, z, 0xee));
      out[g][2] = _mm256_castps_si256(_mm256_shuffle_ps(y, w, 0x44));
      out[g][3] = _mm256_castps_si256(_mm256_shuffle_ps(y, w, 0xee));
    }
    for (int i = 0; i < 4; i++) {
      to[c + i] = {out[0][i], out[1][i]};
    }
  }
}
GLM_INLINE uint32_t sign_bits(__m256i a, __m256i b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(a))) |
      static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(b))) << 8;
}
GLM_INLINE uint32_t above(U16 x, uint32_t limit) {
  const __m256i flip = _mm256_set1_epi32(INT32_MIN);
  const __m256i most = _mm256_set1_epi32(static_cast<int>(limit ^ 0x80000000u));
  return sign_bits(
      _mm256_cmpgt_epi32(_mm256_xor_si256(x.a, flip), most),
      _mm256_cmpgt_epi32(_mm256_xor_si256(x.b, flip), most));
}
GLM_INLINE uint32_t equal_to(U16 x, uint32_t word) {
  const __m256i same = _mm256_set1_epi32(static_cast<int>(word));
  return sign_bits(
      _mm256_cmpeq_epi32(x.a, same), _mm256_cmpeq_epi32(x.b, same));
}

#else  // portable

GLM_INLINE F16 sub(F16 a, F16 b) {
  return a - b;
}
GLM_INLINE F16 div(F16 a, F16 b) {
  return a / b;
}
GLM_INLINE F16 pick(I16 mask, F16 a, F16 b) {
  return as_float(choose(mask, bit_cast<U16>(a), bit_cast<U16>(b)));
}
GLM_INLINE F16 larger(F16 a, F16 b) {
  return pick(a > b, a, b);
}
GLM_INLINE F16 relu(F16 a) {
  return pick(a < zero(), zero(), a);
}
GLM_INLINE void store_words(uint32_t* p, U16 a) {
  memcpy(p, &a, sizeof(a));
}
GLM_INLINE U16 add_words(U16 a, U16 b) {
  return a + b;
}
GLM_INLINE F16 zero_below(F16 a, F16 x, float low) {
  return pick(x >= splat(low), a, pick(x < splat(low), zero(), x));
}
GLM_INLINE U16 ordered(F16 a) {
  a = pick(a == a, a, splat(-__builtin_inff()));
  const U16 u = bit_cast<U16>(a + zero());
  const U16 flip = bit_cast<U16>(bit_cast<I16>(u) >> 31) | 0x80000000u;
  return u ^ flip;
}
GLM_INLINE U16 load_bytes(const uint8_t* p) {
  U16 out;
  for (int i = 0; i < kHalf; i++) {
    out[i] = p[i];
  }
  return out;
}
GLM_INLINE U16 load_shorts(const uint8_t* p) {
  uint16_t v[kHalf];
  memcpy(v, p, sizeof(v));
  U16 out;
  for (int i = 0; i < kHalf; i++) {
    out[i] = v[i];
  }
  return out;
}
GLM_INLINE F16 load_halves(const uint8_t* p) {
  return half_to_float(load_shorts(p));
}
GLM_INLINE void split_halves(U16 words, F16& low, F16& high) {
  low = half_to_float(words);
  high = half_to_float(shift_right<16>(words));
}
GLM_INLINE void
transpose_words(const uint8_t* rows, size_t stride, U16 to[16]) {
  for (int c = 0; c < 16; c++) {
    for (int r = 0; r < 16; r++) {
      uint32_t word;
      memcpy(&word, rows + r * stride + 4 * c, 4);
      to[c][r] = word;
    }
  }
}
GLM_INLINE uint32_t above(U16 a, uint32_t limit) {
  uint32_t mask = 0;
  for (int i = 0; i < kHalf; i++) {
    mask |= static_cast<uint32_t>(a[i] > limit) << i;
  }
  return mask;
}
GLM_INLINE uint32_t equal_to(U16 a, uint32_t word) {
  uint32_t mask = 0;
  for (int i = 0; i < kHalf; i++) {
    mask |= static_cast<uint32_t>(a[i] == word) << i;
  }
  return mask;
}

#endif

#if !defined(GLM_AVX512)
GLM_INLINE int pack_words(U16 a, uint32_t keep, void* to) {
  uint32_t words[kHalf], *out = static_cast<uint32_t*>(to);
  store_words(words, a);
  int count = 0;
  for (; keep; keep &= keep - 1) {
    out[count++] = words[__builtin_ctz(keep)];
  }
  return count;
}
GLM_INLINE U16 ascending(int first) {
  uint32_t words[kHalf];
  for (int i = 0; i < kHalf; i++) {
    words[i] = static_cast<uint32_t>(first + i);
  }
  return load_words(words);
}
#endif

// Computes softmax_exp.h's exp_negative in every lane.
GLM_INLINE F16 exp_negative(F16 x) {
  const F16 shifter = splat(12582912.0f), one = splat(1.0f);
  const F16 shifted = fma(x, splat(1.44269504f), shifter);
  const F16 n = sub(shifted, shifter);
  const F16 head = fma(n, splat(-0.693145752f), x);
  const F16 r = fma(n, splat(-1.42860677e-6f), head);
  const F16 r_rest = fma(n, splat(-1.42860677e-6f), sub(head, r));
  F16 p = splat(2.48015873e-5f);
  p = fma(p, r, splat(1.98412698e-4f));
  p = fma(p, r, splat(1.38888889e-3f));
  p = fma(p, r, splat(8.33333333e-3f));
  p = fma(p, r, splat(4.16666667e-2f));
  p = fma(p, r, splat(1.66666667e-1f));
  p = fma(p, r, splat(0.5f));
  const F16 sum = add(one, r);
  const F16 dropped = add(sub(one, sum), r);
  const F16 tail = add(fma(mul(r, r), p, dropped), r_rest);
  const U16 power = shift_left<23>(as_words(shifted));
  const F16 y = as_float(add_words(as_words(add(sum, tail)), power));
  return zero_below(y, x, -87.0f);
}

}  // namespace
