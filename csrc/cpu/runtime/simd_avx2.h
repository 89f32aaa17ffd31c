// The lanes of simd.h on AVX2, in two registers. Only simd.h includes this.
#pragma once

#include <immintrin.h>

namespace {

struct F16 {
  __m256 a, b;
};
struct U16 {
  __m256i a, b;
};
// Half of the lanes.
using F8 = __m256;
using U8 = __m256i;

GLM_INLINE F16 zero() {
  return {_mm256_setzero_ps(), _mm256_setzero_ps()};
}
GLM_INLINE F16 load(const float* p) {
  return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
GLM_INLINE void load(const float* p, F8& v) {
  v = _mm256_loadu_ps(p);
}
GLM_INLINE void store(float* p, F16 v) {
  _mm256_storeu_ps(p, v.a);
  _mm256_storeu_ps(p + 8, v.b);
}
GLM_INLINE F16 splat(float v) {
  return {_mm256_set1_ps(v), _mm256_set1_ps(v)};
}
GLM_INLINE F8 add(F8 x, F8 y) {
  return _mm256_add_ps(x, y);
}
GLM_INLINE F16 add(F16 x, F16 y) {
  return {add(x.a, y.a), add(x.b, y.b)};
}
GLM_INLINE F8 mul(F8 x, F8 y) {
  return _mm256_mul_ps(x, y);
}
GLM_INLINE F16 mul(F16 x, F16 y) {
  return {mul(x.a, y.a), mul(x.b, y.b)};
}
GLM_INLINE F8 fma(F8 x, F8 y, F8 z) {
  return _mm256_fmadd_ps(x, y, z);
}
GLM_INLINE F16 fma(F16 x, F16 y, F16 z) {
  return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)};
}
GLM_INLINE U16 load_words(const void* p) {
  const auto* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
GLM_INLINE U16 splat_word(const uint8_t* p) {
  int word;
  memcpy(&word, p, sizeof(word));
  return {_mm256_set1_epi32(word), _mm256_set1_epi32(word)};
}
template <int n>
GLM_INLINE U8 shift_right(U8 v) {
  return n == 0 ? v : _mm256_srli_epi32(v, n);
}
template <int n>
GLM_INLINE U16 shift_right(U16 v) {
  return {shift_right<n>(v.a), shift_right<n>(v.b)};
}
template <int n>
GLM_INLINE U16 shift_right_signed(U16 v) {
  return {_mm256_srai_epi32(v.a, n), _mm256_srai_epi32(v.b, n)};
}
template <int n>
GLM_INLINE U8 shift_left(U8 v) {
  return n == 0 ? v : _mm256_slli_epi32(v, n);
}
template <int n>
GLM_INLINE U16 shift_left(U16 v) {
  return {shift_left<n>(v.a), shift_left<n>(v.b)};
}
GLM_INLINE U8 bits_and(U8 v, uint32_t m) {
  return _mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(m)));
}
GLM_INLINE U16 bits_and(U16 v, uint32_t m) {
  // A compiler would read it from memory for either half.
  __m256i k = _mm256_set1_epi32(static_cast<int>(m));
  __asm__("" : "+x"(k));
  return {_mm256_and_si256(v.a, k), _mm256_and_si256(v.b, k)};
}
GLM_INLINE U16 bits_or(U16 x, U16 y) {
  return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)};
}
GLM_INLINE U16 add_words(U16 v, uint32_t n) {
  const __m256i k = _mm256_set1_epi32(static_cast<int>(n));
  return {_mm256_add_epi32(v.a, k), _mm256_add_epi32(v.b, k)};
}
GLM_INLINE F8 to_float(U8 v) {
  return _mm256_cvtepi32_ps(v);
}
GLM_INLINE F16 to_float(U16 v) {
  return {to_float(v.a), to_float(v.b)};
}
GLM_INLINE F8 as_float(U8 v) {
  return _mm256_castsi256_ps(v);
}
GLM_INLINE F16 as_float(U16 v) {
  return {as_float(v.a), as_float(v.b)};
}
GLM_INLINE U16 as_words(F16 v) {
  return {_mm256_castps_si256(v.a), _mm256_castps_si256(v.b)};
}
GLM_INLINE U16
set_where_equal(U16 v, uint32_t mask, uint32_t n, uint32_t bits) {
  const __m256i of_n = _mm256_set1_epi32(static_cast<int>(n));
  const U16 masked = bits_and(v, mask);
  const U16 equal = {
      _mm256_cmpeq_epi32(masked.a, of_n), _mm256_cmpeq_epi32(masked.b, of_n)};
  return bits_or(v, bits_and(equal, bits));
}
GLM_INLINE F16 nan_where(U16 v, uint32_t mask, F16 x) {
  const U16 masked = bits_and(v, mask);
  const __m256i none = _mm256_setzero_si256();
  const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
  const auto choose = [&](__m256i a, __m256 b) GLM_ALWAYS_INLINE {
    const __m256i zero = _mm256_cmpeq_epi32(a, none);
    return _mm256_blendv_ps(nan, b, _mm256_castsi256_ps(zero));
  };
  return {choose(masked.a, x.a), choose(masked.b, x.b)};
}
GLM_INLINE F16 half_to_float(U16 v) {
  const auto narrow = [](__m256i w) {
    const __m256i low = _mm256_and_si256(w, _mm256_set1_epi32(0xffff));
    const __m256i p = _mm256_packus_epi32(low, low);
    const __m256i q = _mm256_permute4x64_epi64(p, 0x08);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(q));
  };
  return {narrow(v.a), narrow(v.b)};
}
// The upper halves of sixteen floats, by codes of four bits that are the lower
// or the upper ones of bytes.
struct UpperTable {
  __m256i low, high;  // bytes of the halves
  GLM_INLINE explicit UpperTable(const float* v)
      : low(every_fourth_byte(v, 2)), high(every_fourth_byte(v, 3)) {}
  // Codes of bytes 0 and 1 of every word, or of bytes 2 and 3, become the
  // halves of one: of `part` 0 (or 1) of four lanes, words 0 and 2 (or 1 and
  // 3).
  template <int part>
  GLM_INLINE U8 spread(U8 codes) const {
    const U8 i = bits_and(codes, 0x0f0f0f0fu);
    const __m256i l = _mm256_shuffle_epi8(low, i);
    const __m256i h = _mm256_shuffle_epi8(high, i);
    return part == 0 ? _mm256_unpacklo_epi8(l, h) : _mm256_unpackhi_epi8(l, h);
  }
  template <int part>
  GLM_INLINE U16 spread(U16 codes) const {
    return {spread<part>(codes.a), spread<part>(codes.b)};
  }

 private:
  static GLM_INLINE __m256i every_fourth_byte(const float* v, int first) {
    uint8_t bytes[64], picked[16];
    memcpy(bytes, v, sizeof(bytes));
    for (int i = 0; i < 16; i++) {
      picked[i] = bytes[4 * i + first];
    }
    const auto* q = reinterpret_cast<const __m128i*>(picked);
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(q));
  }
};
struct Shuffle {
  __m256i a, b;
  GLM_INLINE explicit Shuffle(const uint8_t* c)
      : a(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(c))),
        b(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(c + 32))) {}
  GLM_INLINE U16 operator()(const uint8_t* p) const {
    const auto* q = reinterpret_cast<const __m128i*>(p);
    return spread(_mm256_broadcastsi128_si256(_mm_loadu_si128(q)));
  }
  GLM_INLINE U16 first_eight(const uint8_t* p) const {
    const auto* q = reinterpret_cast<const __m128i*>(p);
    return spread(_mm256_broadcastq_epi64(_mm_loadl_epi64(q)));
  }
  GLM_INLINE U16 spread(__m256i v) const {
    return {_mm256_shuffle_epi8(v, a), _mm256_shuffle_epi8(v, b)};
  }
};
GLM_INLINE U16 max_words(U16 v, uint32_t n) {
  const __m256i k = _mm256_set1_epi32(static_cast<int>(n));
  return {_mm256_max_epu32(v.a, k), _mm256_max_epu32(v.b, k)};
}
GLM_INLINE void
split_pairs(__m256i a, __m256i b, __m256i& first, __m256i& second) {
  const __m256 x = _mm256_castsi256_ps(a), y = _mm256_castsi256_ps(b);
  const __m256 even = _mm256_shuffle_ps(x, y, 0x88);
  const __m256 odd = _mm256_shuffle_ps(x, y, 0xdd);
  first = _mm256_permute4x64_epi64(_mm256_castps_si256(even), 0xd8);
  second = _mm256_permute4x64_epi64(_mm256_castps_si256(odd), 0xd8);
}
GLM_INLINE void load_pairs(const uint8_t* p, U16& first, U16& second) {
  const auto* q = reinterpret_cast<const __m256i*>(p);
  split_pairs(
      _mm256_loadu_si256(q), _mm256_loadu_si256(q + 1), first.a, second.a);
  split_pairs(
      _mm256_loadu_si256(q + 2), _mm256_loadu_si256(q + 3), first.b, second.b);
}
// The 16 bytes at p in the lower half, those at q in the upper.
GLM_INLINE __m256i load_halves(const uint8_t* p, const uint8_t* q) {
  return _mm256_loadu2_m128i(
      reinterpret_cast<const __m128i*>(q), reinterpret_cast<const __m128i*>(p));
}
// Byte controls that are the same in both halves of a register.
GLM_INLINE __m256i control(int a, int b, int c, int d) {
  return _mm256_broadcastsi128_si256(_mm_setr_epi32(a, b, c, d));
}
// Four lanes of three bytes lie in 12.
constexpr size_t kThreesOverread = 4;
GLM_INLINE U16 load_threes(const uint8_t* p) {
  const __m256i each = control(0x80020100, 0x80050403, 0x80080706, 0x800b0a09);
  return {
      _mm256_shuffle_epi8(load_halves(p, p + 12), each),
      _mm256_shuffle_epi8(load_halves(p + 24, p + 36), each)};
}
// Two lanes of `stride` bytes lie in 16: their first words become the lower
// half of those, their second words, `on` bytes later, the upper.
template <int stride, int on>
GLM_INLINE void load_two_words(const uint8_t* p, U16& first, U16& second) {
  constexpr int kWord = 0x03020100, kByte = 0x01010101;
  const __m256i each = control(
      kWord,
      kWord + stride * kByte,
      kWord + on * kByte,
      kWord + (stride + on) * kByte);
  const auto eight = [&](const uint8_t* q, __m256i& one, __m256i& two) {
    const __m256i a = _mm256_shuffle_epi8(load_halves(q, q + 4 * stride), each);
    const __m256i b =
        _mm256_shuffle_epi8(load_halves(q + 2 * stride, q + 6 * stride), each);
    one = _mm256_unpacklo_epi64(a, b);
    two = _mm256_unpackhi_epi64(a, b);
  };
  eight(p, first.a, second.a);
  eight(p + 8 * stride, first.b, second.b);
}
constexpr size_t kFivesOverread = 6, kSixesOverread = 4;
GLM_INLINE void load_fives(const uint8_t* p, U16& first, U16& second) {
  load_two_words<5, 1>(p, first, second);
}
GLM_INLINE void load_sixes(const uint8_t* p, U16& first, U16& second) {
  load_two_words<6, 2>(p, first, second);
}
// Each lane has 16 bytes of its own, of which six are the next one's.
constexpr size_t kTensOverread = 6;
GLM_INLINE void
load_tens(const uint8_t* p, U16& first, U16& second, U16& third) {
  const __m256i last = control(0x09080706, 0x80808080, 0x80808080, 0x80808080);
  const auto eight = [&](const uint8_t* q,
                         __m256i& one,
                         __m256i& two,
                         __m256i& three) {
    __m256i v[4];
    unroll<4>(GLM_EACH(i) { v[i] = load_halves(q + 10 * i, q + 40 + 10 * i); });
    const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]);
    const __m256i b = _mm256_unpacklo_epi32(v[2], v[3]);
    one = _mm256_unpacklo_epi64(a, b);
    two = _mm256_unpackhi_epi64(a, b);
    unroll<4>(GLM_EACH(i) { v[i] = _mm256_shuffle_epi8(v[i], last); });
    three = _mm256_unpacklo_epi64(
        _mm256_unpacklo_epi32(v[0], v[1]), _mm256_unpacklo_epi32(v[2], v[3]));
  };
  eight(p, first.a, second.a, third.a);
  eight(p + 80, first.b, second.b, third.b);
}
GLM_INLINE void load_quads(const uint8_t* p, F16 out[4]) {
  U16 low[2], high[2];  // the first and second pair of values of every lane
  for (int h = 0; h < 2; h++) {
    const auto* q = reinterpret_cast<const __m256i*>(p + 128 * h);
    __m256i e[2], o[2];
    for (int j = 0; j < 2; j++) {
      split_pairs(
          _mm256_loadu_si256(q + 2 * j),
          _mm256_loadu_si256(q + 2 * j + 1),
          e[j],
          o[j]);
    }
    __m256i v[4];
    split_pairs(e[0], e[1], v[0], v[2]);
    split_pairs(o[0], o[1], v[1], v[3]);
    (h ? low[0].b : low[0].a) = v[0];
    (h ? low[1].b : low[1].a) = v[1];
    (h ? high[0].b : high[0].a) = v[2];
    (h ? high[1].b : high[1].a) = v[3];
  }
  out[0] = as_float(low[0]);
  out[1] = as_float(low[1]);
  out[2] = as_float(high[0]);
  out[3] = as_float(high[1]);
}
GLM_INLINE void split_lanes(F16 x, F16 y, F16& even, F16& odd) {
  const auto split = [](F16 v, __m256& first, __m256& second) {
    __m256i e, o;
    split_pairs(_mm256_castps_si256(v.a), _mm256_castps_si256(v.b), e, o);
    first = _mm256_castsi256_ps(e);
    second = _mm256_castsi256_ps(o);
  };
  F16 e, o;
  split(x, e.a, o.a);
  split(y, e.b, o.b);
  even = e;
  odd = o;
}
GLM_INLINE void interleave_lanes(F16& x, F16& y) {
  const F16 low = {_mm256_unpacklo_ps(x.a, y.a), _mm256_unpacklo_ps(x.b, y.b)};
  const F16 high = {_mm256_unpackhi_ps(x.a, y.a), _mm256_unpackhi_ps(x.b, y.b)};
  x = low;
  y = high;
}
GLM_INLINE void separate_lanes(F8& x, F8& y) {
  const F8 even = _mm256_shuffle_ps(x, y, 0x88);
  y = _mm256_shuffle_ps(x, y, 0xdd);
  x = even;
}
GLM_INLINE void separate_lanes(F16& x, F16& y) {
  separate_lanes(x.a, y.a);
  separate_lanes(x.b, y.b);
}
GLM_INLINE float butterfly_sum(F16 low, F16 high) {
  const F16 s = add(low, high);
  const __m256 q = _mm256_add_ps(s.a, s.b);
  const __m128 o =
      _mm_add_ps(_mm256_castps256_ps128(q), _mm256_extractf128_ps(q, 1));
  const __m128 t = _mm_add_ps(o, _mm_movehl_ps(o, o));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_shuffle_ps(t, t, 1)));
}

}  // namespace
