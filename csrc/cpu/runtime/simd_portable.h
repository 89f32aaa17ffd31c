// The lanes of simd.h on the compiler's own vectors, which are NEON on arm64.
// Only simd.h includes this.
#pragma once

#include <cstring>

namespace {

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
GLM_INLINE U16 splat_word(const uint8_t* p) {
  uint32_t word;
  memcpy(&word, p, sizeof(word));
  return U16{} + word;
}
template <int n>
GLM_INLINE U16 shift_right_signed(U16 a) {
  return bit_cast<U16>(bit_cast<I16>(a) >> n);
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
GLM_INLINE U16 as_words(F16 a) {
  return bit_cast<U16>(a);
}
GLM_INLINE U16 choose(I16 mask, U16 a, U16 b) {
  const U16 m = bit_cast<U16>(mask);
  return (a & m) | (b & ~m);
}
GLM_INLINE U16
set_where_equal(U16 a, uint32_t mask, uint32_t n, uint32_t bits) {
  return a | (bit_cast<U16>((a & mask) == n) & bits);
}
GLM_INLINE F16 nan_where(U16 a, uint32_t mask, F16 v) {
  const U16 nan = U16{} + 0x7fc00000u;
  return as_float(choose((a & mask) != 0u, nan, bit_cast<U16>(v)));
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
  GLM_INLINE U16 first_eight(const uint8_t* p) const {
    return (*this)(p);
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
GLM_INLINE void split_lanes(F16 a, F16 b, F16& even, F16& odd) {
  float v[2 * kHalf];
  store(v, a);
  store(v + kHalf, b);
  for (int i = 0; i < kHalf; i++) {
    even[i] = v[2 * i];
    odd[i] = v[2 * i + 1];
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

}  // namespace
