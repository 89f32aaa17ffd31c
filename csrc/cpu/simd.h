// Sixteen fp32 lanes, half of a simdgroup, on the instruction set that the
// including file selects with GLM_AVX512, GLM_AVX2 or neither (portable).
//
// Everything here has internal linkage: the same names are compiled once per
// instruction set, and the linker must not merge them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(GLM_AVX512) || defined(GLM_AVX2)
#include <immintrin.h>
#endif

#define GLM_INLINE inline __attribute__((always_inline))

namespace {

constexpr int kHalf = 16;  // lanes in one vector; a simdgroup is two of them

template <int n>
struct Constant {
  constexpr operator int() const {
    return n;
  }
};

// fn(0), fn(1), … fn(n - 1) in straight line, each index a constant: arrays of
// vectors that are indexed this way stay in registers.
template <int n, class Fn>
GLM_INLINE void unroll(Fn&& fn) {
  if constexpr (n > 0) {
    unroll<n - 1>(fn);
    fn(Constant<n - 1>());
  }
}
#define GLM_EACH(i) [&](auto i) __attribute__((always_inline))

#if defined(GLM_AVX512)

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
template <int n>
GLM_INLINE U16 shift_right(U16 a) {
  if constexpr (n == 0) {
    return a;
  } else {
    return _mm512_srli_epi32(a, n);
  }
}
template <int n>
GLM_INLINE U16 shift_left(U16 a) {
  return _mm512_slli_epi32(a, n);
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
// The low 16 bits of every word, read as IEEE half precision.
GLM_INLINE F16 half_to_float(U16 a) {
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a));
}
// table[word & 15]: vpermps reads only the low four bits of the index.
struct Table16 {
  __m512 t;
  GLM_INLINE explicit Table16(const float* v) : t(_mm512_loadu_ps(v)) {}
  GLM_INLINE F16 operator()(U16 index) const {
    return _mm512_permutexvar_ps(index, t);
  }
};
// Byte i of the result is byte control[i] of the 16 at p, or 0 where it is
// 0x80; four bytes make a lane.
struct Shuffle {
  __m512i control;
  GLM_INLINE explicit Shuffle(const uint8_t* c)
      : control(_mm512_loadu_si512(c)) {}
  GLM_INLINE U16 operator()(const uint8_t* p) const {
    const auto* q = reinterpret_cast<const __m128i*>(p);
    return _mm512_shuffle_epi8(
        _mm512_broadcast_i32x4(_mm_loadu_si128(q)), control);
  }
};
GLM_INLINE U16 max_words(U16 a, uint32_t n) {
  return _mm512_max_epu32(a, _mm512_set1_epi32(static_cast<int>(n)));
}
// Lane l owns words 2l and 2l+1.
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
// Lane l owns the unaligned word at p + stride * l.
template <int stride>
GLM_INLINE U16 load_strided(const uint8_t* p) {
  const __m512i at = _mm512_mullo_epi32(
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
      _mm512_set1_epi32(stride));
  return _mm512_i32gather_epi32(at, p, 1);
}
// Lane l owns the four floats at p + 16 l (bytes): value v of every lane.
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
// The butterfly of a simdgroup sum: lane distances 16, 8, 4, 2, 1.
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

#elif defined(GLM_AVX2)

struct F16 {
  __m256 a, b;
};
struct U16 {
  __m256i a, b;
};

GLM_INLINE F16 zero() {
  return {_mm256_setzero_ps(), _mm256_setzero_ps()};
}
GLM_INLINE F16 load(const float* p) {
  return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
GLM_INLINE void store(float* p, F16 v) {
  _mm256_storeu_ps(p, v.a);
  _mm256_storeu_ps(p + 8, v.b);
}
GLM_INLINE F16 splat(float v) {
  return {_mm256_set1_ps(v), _mm256_set1_ps(v)};
}
GLM_INLINE F16 add(F16 x, F16 y) {
  return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
GLM_INLINE F16 mul(F16 x, F16 y) {
  return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
GLM_INLINE F16 fma(F16 x, F16 y, F16 z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
GLM_INLINE U16 load_words(const void* p) {
  const auto* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
template <int n>
GLM_INLINE U16 shift_right(U16 v) {
  if constexpr (n == 0) {
    return v;
  } else {
    return {_mm256_srli_epi32(v.a, n), _mm256_srli_epi32(v.b, n)};
  }
}
template <int n>
GLM_INLINE U16 shift_left(U16 v) {
  return {_mm256_slli_epi32(v.a, n), _mm256_slli_epi32(v.b, n)};
}
GLM_INLINE U16 bits_and(U16 v, uint32_t m) {
  const __m256i k = _mm256_set1_epi32(static_cast<int>(m));
  return {_mm256_and_si256(v.a, k), _mm256_and_si256(v.b, k)};
}
GLM_INLINE U16 bits_or(U16 x, U16 y) {
  return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)};
}
GLM_INLINE U16 add_words(U16 v, uint32_t n) {
  const __m256i k = _mm256_set1_epi32(static_cast<int>(n));
  return {_mm256_add_epi32(v.a, k), _mm256_add_epi32(v.b, k)};
}
GLM_INLINE F16 to_float(U16 v) {
  return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)};
}
GLM_INLINE F16 as_float(U16 v) {
  return {_mm256_castsi256_ps(v.a), _mm256_castsi256_ps(v.b)};
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
struct Table16 {
  __m256 low, high;
  GLM_INLINE explicit Table16(const float* v)
      : low(_mm256_loadu_ps(v)), high(_mm256_loadu_ps(v + 8)) {}
  GLM_INLINE __m256 lookup(__m256i i) const {
    // Bit 3 of the index, moved to the sign, picks the upper half.
    const __m256 pick = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));
    return _mm256_blendv_ps(
        _mm256_permutevar8x32_ps(low, i),
        _mm256_permutevar8x32_ps(high, i),
        pick);
  }
  GLM_INLINE F16 operator()(U16 index) const {
    return {lookup(index.a), lookup(index.b)};
  }
};
struct Shuffle {
  __m256i a, b;
  GLM_INLINE explicit Shuffle(const uint8_t* c)
      : a(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(c))),
        b(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(c + 32))) {}
  GLM_INLINE U16 operator()(const uint8_t* p) const {
    const auto* q = reinterpret_cast<const __m128i*>(p);
    const __m256i v = _mm256_broadcastsi128_si256(_mm_loadu_si128(q));
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
template <int stride>
GLM_INLINE U16 load_strided(const uint8_t* p) {
  const __m256i at = _mm256_mullo_epi32(
      _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0), _mm256_set1_epi32(stride));
  const auto* a = reinterpret_cast<const int*>(p);
  const auto* b = reinterpret_cast<const int*>(p + 8 * stride);
  return {_mm256_i32gather_epi32(a, at, 1), _mm256_i32gather_epi32(b, at, 1)};
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
GLM_INLINE float butterfly_sum(F16 low, F16 high) {
  const F16 s = add(low, high);
  const __m256 q = _mm256_add_ps(s.a, s.b);
  const __m128 o =
      _mm_add_ps(_mm256_castps256_ps128(q), _mm256_extractf128_ps(q, 1));
  const __m128 t = _mm_add_ps(o, _mm_movehl_ps(o, o));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_shuffle_ps(t, t, 1)));
}

#else  // portable: the compiler's own vectors, NEON on arm64

typedef float F16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));

template <class To, class From>
GLM_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

GLM_INLINE F16 zero() {
  return F16{};
}
GLM_INLINE F16 load(const float* p) {
  F16 out;
  memcpy(&out, p, sizeof(out));
  return out;
}
GLM_INLINE void store(float* p, F16 a) {
  memcpy(p, &a, sizeof(a));
}
GLM_INLINE F16 splat(float a) {
  return F16{} + a;
}
GLM_INLINE F16 add(F16 a, F16 b) {
  return a + b;
}
GLM_INLINE F16 mul(F16 a, F16 b) {
  return a * b;
}
GLM_INLINE F16 fma(F16 a, F16 b, F16 c) {
#if __has_builtin(__builtin_elementwise_fma)
  return __builtin_elementwise_fma(a, b, c);
#else
  F16 out;
  for (int i = 0; i < kHalf; i++) {
    out[i] = __builtin_fmaf(a[i], b[i], c[i]);
  }
  return out;
#endif
}
GLM_INLINE U16 load_words(const void* p) {
  U16 out;
  memcpy(&out, p, sizeof(out));
  return out;
}
template <int n>
GLM_INLINE U16 shift_right(U16 a) {
  return a >> n;
}
template <int n>
GLM_INLINE U16 shift_left(U16 a) {
  return a << n;
}
GLM_INLINE U16 bits_and(U16 a, uint32_t m) {
  return a & m;
}
GLM_INLINE U16 bits_or(U16 a, U16 b) {
  return a | b;
}
GLM_INLINE U16 add_words(U16 a, uint32_t n) {
  return a + n;
}
GLM_INLINE F16 to_float(U16 a) {
  return __builtin_convertvector(bit_cast<I16>(a), F16);
}
GLM_INLINE F16 as_float(U16 a) {
  return bit_cast<F16>(a);
}
GLM_INLINE U16 choose(I16 mask, U16 a, U16 b) {
  const U16 m = bit_cast<U16>(mask);
  return (a & m) | (b & ~m);
}
GLM_INLINE F16 half_to_float(U16 a) {
  const U16 sign = (a & 0x8000u) << 16, magnitude = a & 0x7fffu;
  const U16 normal = (magnitude << 13) + 0x38000000u;
  const U16 payload = (magnitude & 0x3ffu) << 13;
  const U16 quiet = bit_cast<U16>(payload != 0u) & 0x400000u;
  const U16 special = 0x7f800000u | payload | quiet;
  // Subnormal halves are magnitude * 2^-24, exact in fp32.
  const U16 tiny = bit_cast<U16>(mul(to_float(magnitude), splat(0x1p-24f)));
  const U16 finite = choose(magnitude < 0x400u, tiny, normal);
  return as_float(sign | choose(magnitude >= 0x7c00u, special, finite));
}
struct Table16 {
  float t[16];
  GLM_INLINE explicit Table16(const float* v) {
    memcpy(t, v, sizeof(t));
  }
  GLM_INLINE F16 operator()(U16 index) const {
    F16 out;
    for (int i = 0; i < kHalf; i++) {
      out[i] = t[index[i] & 15u];
    }
    return out;
  }
};
struct Shuffle {
  uint8_t control[4 * kHalf];
  GLM_INLINE explicit Shuffle(const uint8_t* c) {
    memcpy(control, c, sizeof(control));
  }
  GLM_INLINE U16 operator()(const uint8_t* p) const {
    uint8_t out[4 * kHalf];
    for (int i = 0; i < 4 * kHalf; i++) {
      out[i] = control[i] == 0x80 ? 0 : p[control[i]];
    }
    return load_words(out);
  }
};
GLM_INLINE U16 max_words(U16 a, uint32_t n) {
  const U16 k = U16{} + n;
  return choose(a > k, a, k);
}
template <int stride>
GLM_INLINE U16 load_strided(const uint8_t* p) {
  uint32_t out[kHalf];
  for (int i = 0; i < kHalf; i++) {
    memcpy(&out[i], p + stride * i, 4);
  }
  return load_words(out);
}
GLM_INLINE void load_pairs(const uint8_t* p, U16& first, U16& second) {
  first = load_strided<8>(p);
  second = load_strided<8>(p + 4);
}
GLM_INLINE void load_quads(const uint8_t* p, F16 out[4]) {
  for (int v = 0; v < 4; v++) {
    out[v] = as_float(load_strided<16>(p + 4 * v));
  }
}
GLM_INLINE float butterfly_sum(F16 low, F16 high) {
  float s[kHalf];
  store(s, low + high);
  for (int step = kHalf / 2; step >= 1; step /= 2) {
    for (int i = 0; i < step; i++) {
      s[i] = s[i] + s[i + step];
    }
  }
  return s[0];
}

#endif

}  // namespace
