// The lanes of simd.h on AVX-512, in one register. Only simd.h includes this.
#pragma once

#include <immintrin.h>

namespace {

using F16 = __m512;
using U16 = __m512i;

GLM_INLINE F16 zero() {
  return _mm512_setzero_ps();
}
GLM_INLINE F16 load(const float* p) {
  return _mm512_loadu_ps(p);
}
GLM_INLINE void store(float* p, F16 a) {
  _mm512_storeu_ps(p, a);
}
GLM_INLINE F16 splat(float a) {
  return _mm512_set1_ps(a);
}
GLM_INLINE F16 add(F16 a, F16 b) {
  return _mm512_add_ps(a, b);
}
GLM_INLINE F16 mul(F16 a, F16 b) {
  return _mm512_mul_ps(a, b);
}
GLM_INLINE F16 fma(F16 a, F16 b, F16 c) {
  return _mm512_fmadd_ps(a, b, c);
}
GLM_INLINE U16 load_words(const void* p) {
  return _mm512_loadu_si512(p);
}
GLM_INLINE U16 splat_word(const uint8_t* p) {
  int word;
  memcpy(&word, p, sizeof(word));
  return _mm512_set1_epi32(word);
}
// The first `count` bytes, then zeros.
GLM_INLINE U16 load_bytes(const void* p, size_t count) {
  const uint64_t all = ~uint64_t{0};
  return _mm512_maskz_loadu_epi8(count < 64 ? ~(all << count) : all, p);
}
template <int n>
GLM_INLINE U16 shift_right(U16 a) {
  if constexpr (n == 0) {
    return a;
  } else {
    return _mm512_srli_epi32(a, n);
  }
}
template <int n>
GLM_INLINE U16 shift_right_signed(U16 a) {
  return _mm512_srai_epi32(a, n);
}
template <int n>
GLM_INLINE U16 shift_left(U16 a) {
  if constexpr (n == 0) {
    return a;
  } else {
    return _mm512_slli_epi32(a, n);
  }
}
GLM_INLINE U16 bits_and(U16 a, uint32_t m) {
  return _mm512_and_si512(a, _mm512_set1_epi32(static_cast<int>(m)));
}
GLM_INLINE U16 bits_or(U16 a, U16 b) {
  return _mm512_or_si512(a, b);
}
GLM_INLINE U16 add_words(U16 a, uint32_t n) {
  return _mm512_add_epi32(a, _mm512_set1_epi32(static_cast<int>(n)));
}
GLM_INLINE F16 to_float(U16 a) {
  return _mm512_cvtepi32_ps(a);
}
GLM_INLINE F16 as_float(U16 a) {
  return _mm512_castsi512_ps(a);
}
GLM_INLINE U16 as_words(F16 a) {
  return _mm512_castps_si512(a);
}
GLM_INLINE U16
set_where_equal(U16 a, uint32_t mask, uint32_t n, uint32_t bits) {
  const __m512i of_n = _mm512_set1_epi32(static_cast<int>(n));
  const __m512i set = _mm512_set1_epi32(static_cast<int>(bits));
  const __mmask16 equal = _mm512_cmpeq_epi32_mask(bits_and(a, mask), of_n);
  return _mm512_mask_or_epi32(a, equal, a, set);
}
GLM_INLINE F16 nan_where(U16 a, uint32_t mask, F16 v) {
  const __m512i bits = _mm512_set1_epi32(static_cast<int>(mask));
  const __m512i word = _mm512_castps_si512(v);
  const __m512i nan = _mm512_set1_epi32(0x7fc00000);
  return _mm512_castsi512_ps(
      _mm512_mask_mov_epi32(word, _mm512_test_epi32_mask(a, bits), nan));
}
GLM_INLINE F16 half_to_float(U16 a) {
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a));
}
// vpermps reads only the low four bits of the index.
struct Table16 {
  __m512 t;
  GLM_INLINE explicit Table16(const float* v) : t(_mm512_loadu_ps(v)) {}
  GLM_INLINE F16 operator()(U16 index) const {
    return _mm512_permutexvar_ps(index, t);
  }
};
// The upper halves of sixteen floats, by the lowest four bits of 16-bit words.
struct UpperTable {
  __m512i t;
  GLM_INLINE explicit UpperTable(const float* v)
      : t(_mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(
            _mm512_srli_epi32(_mm512_loadu_si512(v), 16)))) {}
  GLM_INLINE U16 operator()(U16 index) const {
    return _mm512_permutexvar_epi16(index, t);
  }
};
struct Shuffle {
  __m512i control;
  GLM_INLINE explicit Shuffle(const uint8_t* c)
      : control(_mm512_loadu_si512(c)) {}
  GLM_INLINE U16 operator()(const uint8_t* p) const {
    const auto* q = reinterpret_cast<const __m128i*>(p);
    return _mm512_shuffle_epi8(
        _mm512_broadcast_i32x4(_mm_loadu_si128(q)), control);
  }
  GLM_INLINE U16 first_eight(const uint8_t* p) const {
    const auto* q = reinterpret_cast<const __m128i*>(p);
    return _mm512_shuffle_epi8(
        _mm512_broadcastq_epi64(_mm_loadl_epi64(q)), control);
  }
};
GLM_INLINE U16 max_words(U16 a, uint32_t n) {
  return _mm512_max_epu32(a, _mm512_set1_epi32(static_cast<int>(n)));
}
GLM_INLINE void load_pairs(const uint8_t* p, U16& first, U16& second) {
  const __m512i a = _mm512_loadu_si512(p);
  const __m512i b = _mm512_loadu_si512(p + 64);
  const __m512i even = _mm512_set_epi32(
      30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_set_epi32(
      31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  first = _mm512_permutex2var_epi32(a, even, b);
  second = _mm512_permutex2var_epi32(a, odd, b);
}
// Byte controls that are the same in all four parts of a register.
GLM_INLINE __m512i control(int a, int b, int c, int d) {
  return _mm512_broadcast_i32x4(_mm_setr_epi32(a, b, c, d));
}
// A register's four parts, of four lanes each, are gathered by words.
GLM_INLINE U16 spread_threes(__m512i v) {
  const __m512i each =
      _mm512_setr_epi32(0, 1, 2, 15, 3, 4, 5, 15, 6, 7, 8, 15, 9, 10, 11, 15);
  return _mm512_shuffle_epi8(
      _mm512_permutexvar_epi32(each, v),
      control(0x80020100, 0x80050403, 0x80080706, 0x800b0a09));
}
// A masked load takes a place among the arithmetic, unlike a whole one.
constexpr size_t kThreesOverread = 16, kFivesOverread = 0, kSixesOverread = 0;
constexpr size_t kTensOverread = 0;
GLM_INLINE U16 load_threes(const uint8_t* p) {
  return spread_threes(_mm512_loadu_si512(p));
}
// Four lanes of more than four bytes lie in two parts that overlap.
GLM_INLINE U16 pick(__m512i low, __m512i high, __m512i first, __m512i second) {
  return _mm512_or_si512(
      _mm512_shuffle_epi8(low, first), _mm512_shuffle_epi8(high, second));
}
GLM_INLINE void load_fives(const uint8_t* p, U16& first, U16& second) {
  const __m512i a = _mm512_loadu_si512(p);
  const __m512i b = _mm512_castsi128_si512(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 64)));
  const __m512i at =
      _mm512_setr_epi32(0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 15, 16, 17, 18);
  const __m512i low = _mm512_permutex2var_epi32(a, at, b);
  const __m512i high = _mm512_permutex2var_epi32(
      a, _mm512_add_epi32(at, _mm512_set1_epi32(1)), b);
  const int none = static_cast<int>(0x80808080);
  first = pick(
      low,
      high,
      control(0x03020100, 0x08070605, 0x0d0c0b0a, none),
      control(none, none, none, 0x0e0d0c0b));
  second = pick(
      low,
      high,
      control(0x04030201, 0x09080706, 0x0e0d0c0b, none),
      control(none, none, none, 0x0f0e0d0c));
}
// Where the 16-bit words of lanes lie that own `owned` of them: of each lane
// the words `first` and `first` + 1, counted from `from` on.
struct Places {
  uint16_t of[32];
};
template <int owned, int first, int from = 0>
GLM_INLINE __m512i places() {
  static constexpr Places made = [] {
    Places p{};
    for (int i = 0; i < 32; i++) {
      const int word = i / 2 * owned + first + i % 2 - from;
      p.of[i] = static_cast<uint16_t>(word);
    }
    return p;
  }();
  return _mm512_loadu_si512(made.of);
}
GLM_INLINE void load_sixes(const uint8_t* p, U16& first, U16& second) {
  const __m512i a = _mm512_loadu_si512(p);
  const __m512i b = _mm512_castsi256_si512(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 64)));
  first = _mm512_permutex2var_epi16(a, places<3, 0>(), b);
  second = _mm512_permutex2var_epi16(a, places<3, 1>(), b);
}
// Two registers hold 64 of the 80 words; the third, the last 32.
template <int first>
GLM_INLINE U16 pick_tens(__m512i a, __m512i b, __m512i c) {
  constexpr int kWhole = (62 - first) / 5 + 1;  // lanes within the first two
  const __m512i low = _mm512_permutex2var_epi16(a, places<5, first>(), b);
  return _mm512_mask_permutexvar_epi16(
      low, ~uint32_t{0} << 2 * kWhole, places<5, first, 48>(), c);
}
GLM_INLINE void
load_tens(const uint8_t* p, U16& first, U16& second, U16& third) {
  const __m512i a = _mm512_loadu_si512(p);
  const __m512i b = _mm512_loadu_si512(p + 64);
  const __m512i c = _mm512_loadu_si512(p + 96);
  first = pick_tens<0>(a, b, c);
  second = pick_tens<2>(a, b, c);
  third = pick_tens<3>(a, b, c);
}
GLM_INLINE void load_quads(const uint8_t* p, F16 out[4]) {
  const auto* f = reinterpret_cast<const float*>(p);
  const __m512 a = _mm512_loadu_ps(f), b = _mm512_loadu_ps(f + 16);
  const __m512 c = _mm512_loadu_ps(f + 32), d = _mm512_loadu_ps(f + 48);
  const __m512i even = _mm512_set_epi32(
      30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_set_epi32(
      31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  const __m512 ab02 = _mm512_permutex2var_ps(a, even, b);
  const __m512 ab13 = _mm512_permutex2var_ps(a, odd, b);
  const __m512 cd02 = _mm512_permutex2var_ps(c, even, d);
  const __m512 cd13 = _mm512_permutex2var_ps(c, odd, d);
  out[0] = _mm512_permutex2var_ps(ab02, even, cd02);
  out[2] = _mm512_permutex2var_ps(ab02, odd, cd02);
  out[1] = _mm512_permutex2var_ps(ab13, even, cd13);
  out[3] = _mm512_permutex2var_ps(ab13, odd, cd13);
}
GLM_INLINE void split_lanes(F16 a, F16 b, F16& even, F16& odd) {
  const __m512i first = _mm512_set_epi32(
      30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i second = _mm512_set_epi32(
      31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  even = _mm512_permutex2var_ps(a, first, b);
  odd = _mm512_permutex2var_ps(a, second, b);
}
GLM_INLINE float butterfly_sum(F16 low, F16 high) {
  const __m512 s = _mm512_add_ps(low, high);
  const __m256 q = _mm256_add_ps(
      _mm512_castps512_ps256(s),
      _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(s), 1)));
  const __m128 o =
      _mm_add_ps(_mm256_castps256_ps128(q), _mm256_extractf128_ps(q, 1));
  const __m128 t = _mm_add_ps(o, _mm_movehl_ps(o, o));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_shuffle_ps(t, t, 1)));
}

}  // namespace
