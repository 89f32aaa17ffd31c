// Common, integer, math and geometric functions. Metal's `fast` and `precise`
// variants are the same here, which is the host's libm.
#pragma once

#include "vec.h"

#define __METAL_MAYBE_FAST_MATH__ 0
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 2

// MLX's bf16_math.h builds its overloads on the __metal_* names.
#define MSL_FLOAT_1(name, value)                    \
  MSL_FUNC float __metal_##name(float x, int = 0) { \
    return value;                                   \
  }
#define MSL_FLOAT_2(name, value)                             \
  MSL_FUNC float __metal_##name(float x, float y, int = 0) { \
    return value;                                            \
  }
#define MSL_LIBM_1(name) MSL_FLOAT_1(name, __builtin_##name##f(x))
#define MSL_LIBM_2(name) MSL_FLOAT_2(name, __builtin_##name##f(x, y))
MSL_LIBM_1(acos)
MSL_LIBM_1(acosh)
MSL_LIBM_1(asin)
MSL_LIBM_1(asinh)
MSL_LIBM_1(atan)
MSL_LIBM_1(atanh)
MSL_LIBM_1(ceil)
MSL_LIBM_1(cos)
MSL_LIBM_1(cosh)
MSL_LIBM_1(exp)
MSL_LIBM_1(exp10)
MSL_LIBM_1(exp2)
MSL_LIBM_1(fabs)
MSL_LIBM_1(floor)
MSL_LIBM_1(log)
MSL_LIBM_1(log10)
MSL_LIBM_1(log2)
MSL_LIBM_1(rint)
MSL_LIBM_1(round)
MSL_LIBM_1(sin)
MSL_LIBM_1(sinh)
MSL_LIBM_1(sqrt)
MSL_LIBM_1(tan)
MSL_LIBM_1(tanh)
MSL_LIBM_1(trunc)
MSL_FLOAT_1(cospi, __builtin_cosf(M_PI_F* x))
MSL_FLOAT_1(sinpi, __builtin_sinf(M_PI_F* x))
MSL_FLOAT_1(tanpi, __builtin_tanf(M_PI_F* x))
MSL_FLOAT_1(fract, __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f))
MSL_FLOAT_1(rsqrt, 1.0f / __builtin_sqrtf(x))
MSL_LIBM_2(atan2)
MSL_LIBM_2(copysign)
MSL_LIBM_2(fdim)
MSL_LIBM_2(fmax)
MSL_LIBM_2(fmin)
MSL_LIBM_2(fmod)
MSL_LIBM_2(nextafter)
MSL_LIBM_2(pow)
MSL_FLOAT_2(powr, __builtin_powf(x, y))
MSL_FLOAT_2(divide, x / y)
#undef MSL_FLOAT_1
#undef MSL_FLOAT_2
#undef MSL_LIBM_1
#undef MSL_LIBM_2

MSL_FUNC float __metal_fma(float x, float y, float z) {
  return __builtin_fmaf(x, y, z);
}
MSL_FUNC float __metal_fmax3(float x, float y, float z, int = 0) {
  return __metal_fmax(x, __metal_fmax(y, z));
}
MSL_FUNC float __metal_fmin3(float x, float y, float z, int = 0) {
  return __metal_fmin(x, __metal_fmin(y, z));
}
MSL_FUNC float __metal_fmedian3(float x, float y, float z, int = 0) {
  return __metal_fmax(__metal_fmin(x, y), __metal_fmin(__metal_fmax(x, y), z));
}
MSL_FUNC float __metal_ldexp(float x, int k, int = 0) {
  return __builtin_ldexpf(x, k);
}
MSL_FUNC float __metal_frexp(float x, thread int* exponent) {
  int e = 0;
  float r = __builtin_frexpf(x, &e);
  *exponent = e;
  return r;
}

// clang-format off
#define MSL_EACH_1(X)                                                        \
  X(acos) X(acosh) X(asin) X(asinh) X(atan) X(atanh) X(ceil) X(cos) X(cosh)  \
  X(cospi) X(exp) X(exp10) X(exp2) X(fabs) X(floor) X(fract) X(log) X(log10) \
  X(log2) X(rint) X(round) X(rsqrt) X(sin) X(sinh) X(sinpi) X(sqrt) X(tan)   \
  X(tanh) X(tanpi) X(trunc)
#define MSL_EACH_2(X)                                            \
  X(atan2) X(copysign) X(divide) X(fdim) X(fmax) X(fmin) X(fmod) \
  X(nextafter) X(pow) X(powr)
// clang-format on

#define MSL_MATH_1(name)                               \
  MSL_FUNC float name(float x) {                       \
    return __metal_##name(x);                          \
  }                                                    \
  MSL_FUNC half name(half x) {                         \
    return (half)__metal_##name((float)x);             \
  }                                                    \
  template <typename T, int N>                         \
  MSL_FUNC metal::vec<T, N> name(metal::vec<T, N> x) { \
    for (int i = 0; i < N; i++) {                      \
      x.data[i] = name(x.data[i]);                     \
    }                                                  \
    return x;                                          \
  }
#define MSL_MATH_2(name)                                                   \
  MSL_FUNC float name(float x, float y) {                                  \
    return __metal_##name(x, y);                                           \
  }                                                                        \
  MSL_FUNC half name(half x, half y) {                                     \
    return (half)__metal_##name((float)x, (float)y);                       \
  }                                                                        \
  template <typename T, int N>                                             \
  MSL_FUNC metal::vec<T, N> name(metal::vec<T, N> x, metal::vec<T, N> y) { \
    for (int i = 0; i < N; i++) {                                          \
      x.data[i] = name(x.data[i], y.data[i]);                              \
    }                                                                      \
    return x;                                                              \
  }

namespace metal {

MSL_EACH_1(MSL_MATH_1)
MSL_EACH_2(MSL_MATH_2)
namespace fast {
MSL_EACH_1(MSL_MATH_1)
MSL_EACH_2(MSL_MATH_2)
}  // namespace fast
namespace precise {
MSL_EACH_1(MSL_MATH_1)
MSL_EACH_2(MSL_MATH_2)
}  // namespace precise
#undef MSL_EACH_1
#undef MSL_EACH_2
#undef MSL_MATH_1
#undef MSL_MATH_2

MSL_FUNC float fma(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
MSL_FUNC half fma(half a, half b, half c) {
  return (half)__builtin_fmaf((float)a, (float)b, (float)c);
}
template <typename T, int N>
MSL_FUNC vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
  for (int i = 0; i < N; i++) {
    a.data[i] = fma(a.data[i], b.data[i], c.data[i]);
  }
  return a;
}
MSL_FUNC float ldexp(float x, int k) {
  return __builtin_ldexpf(x, k);
}
MSL_FUNC float frexp(float x, thread int& exponent) {
  return __metal_frexp(x, &exponent);
}
MSL_FUNC float abs(float x) {
  return __builtin_fabsf(x);
}
MSL_FUNC half abs(half x) {
  return (half)__builtin_fabsf((float)x);
}

#define MSL_INTEGER(T)                          \
  MSL_FUNC constexpr T min(T a, T b) {          \
    return b < a ? b : a;                       \
  }                                             \
  MSL_FUNC constexpr T max(T a, T b) {          \
    return a < b ? b : a;                       \
  }                                             \
  MSL_FUNC constexpr T clamp(T x, T lo, T hi) { \
    return min(max(x, lo), hi);                 \
  }                                             \
  MSL_FUNC constexpr T abs(T x) {               \
    return x < T(0) ? T(-x) : x;                \
  }
MSL_INTEGER(char)
MSL_INTEGER(int8_t)
MSL_INTEGER(uchar)
MSL_INTEGER(short)
MSL_INTEGER(ushort)
MSL_INTEGER(int)
MSL_INTEGER(uint)
MSL_INTEGER(long)
MSL_INTEGER(ulong)
#undef MSL_INTEGER

#define MSL_REAL(T)                                                  \
  MSL_FUNC T min(T a, T b) {                                         \
    return fmin(a, b);                                               \
  }                                                                  \
  MSL_FUNC T max(T a, T b) {                                         \
    return fmax(a, b);                                               \
  }                                                                  \
  MSL_FUNC T clamp(T x, T lo, T hi) {                                \
    return fmin(fmax(x, lo), hi);                                    \
  }                                                                  \
  MSL_FUNC T saturate(T x) {                                         \
    return clamp(x, T(0.0f), T(1.0f));                               \
  }                                                                  \
  MSL_FUNC T mix(T a, T b, T t) {                                    \
    return a + (b - a) * t;                                          \
  }                                                                  \
  MSL_FUNC T sign(T x) {                                             \
    return x > T(0.0f) ? T(1.0f) : x < T(0.0f) ? T(-1.0f) : T(0.0f); \
  }                                                                  \
  MSL_FUNC T step(T edge, T x) {                                     \
    return x < edge ? T(0.0f) : T(1.0f);                             \
  }
MSL_REAL(float)
MSL_REAL(half)
#undef MSL_REAL

#define MSL_VECTOR_2(name)                            \
  template <typename T, int N>                        \
  MSL_FUNC vec<T, N> name(vec<T, N> a, vec<T, N> b) { \
    for (int i = 0; i < N; i++) {                     \
      a.data[i] = name(a.data[i], b.data[i]);         \
    }                                                 \
    return a;                                         \
  }
MSL_VECTOR_2(min)
MSL_VECTOR_2(max)
#undef MSL_VECTOR_2
template <typename T, int N>
MSL_FUNC vec<T, N> abs(vec<T, N> a) {
  for (int i = 0; i < N; i++) {
    a.data[i] = abs(a.data[i]);
  }
  return a;
}
template <typename T, int N>
MSL_FUNC vec<T, N> clamp(vec<T, N> x, vec<T, N> lo, vec<T, N> hi) {
  return min(max(x, lo), hi);
}
template <typename T>
MSL_FUNC T max3(T a, T b, T c) {
  return max(a, max(b, c));
}
template <typename T>
MSL_FUNC T min3(T a, T b, T c) {
  return min(a, min(b, c));
}

#define MSL_CLASSIFY(name)                                      \
  template <typename T, enable_if_t<msl_is_scalar<T>, int> = 0> \
  MSL_FUNC bool name(T x) {                                     \
    return __builtin_##name((float)x);                          \
  }                                                             \
  template <typename T, int N>                                  \
  MSL_FUNC vec<bool, N> name(vec<T, N> x) {                     \
    vec<bool, N> r(false);                                      \
    for (int i = 0; i < N; i++) {                               \
      r.data[i] = name(x.data[i]);                              \
    }                                                           \
    return r;                                                   \
  }
MSL_CLASSIFY(isnan)
MSL_CLASSIFY(isinf)
MSL_CLASSIFY(isfinite)
MSL_CLASSIFY(signbit)
#undef MSL_CLASSIFY

template <typename T>
MSL_FUNC T select(T a, T b, bool c) {
  return c ? b : a;
}
template <typename T, int N>
MSL_FUNC vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<bool, N> c) {
  for (int i = 0; i < N; i++) {
    a.data[i] = c.data[i] ? b.data[i] : a.data[i];
  }
  return a;
}

template <typename T, int N>
MSL_FUNC T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a.data[0] * b.data[0];
  for (int i = 1; i < N; i++) {
    sum += a.data[i] * b.data[i];
  }
  return sum;
}
template <typename T, int N>
MSL_FUNC T length(vec<T, N> a) {
  return sqrt(dot(a, a));
}
template <typename T, int N>
MSL_FUNC vec<T, N> normalize(vec<T, N> a) {
  return a * rsqrt(dot(a, a));
}

template <typename T>
MSL_FUNC T popcount(T x) {
  return (T)__builtin_popcountll((ulong)x & (~0ul >> (64 - 8 * sizeof(T))));
}
template <typename T>
MSL_FUNC T clz(T x) {
  ulong bits = (ulong)x & (~0ul >> (64 - 8 * sizeof(T)));
  return (T)(bits ? __builtin_clzll(bits) - (64 - 8 * (int)sizeof(T))
                  : 8 * (int)sizeof(T));
}
template <typename T>
MSL_FUNC T ctz(T x) {
  return (T)(x ? __builtin_ctzll((ulong)x) : 8 * (int)sizeof(T));
}
MSL_FUNC uint reverse_bits(uint x) {
  return __builtin_bitreverse32(x);
}
MSL_FUNC uint rotate(uint x, uint n) {
  return __builtin_rotateleft32(x, n);
}
MSL_FUNC uint mulhi(uint a, uint b) {
  return (uint)(((ulong)a * b) >> 32);
}
MSL_FUNC int mulhi(int a, int b) {
  return (int)(((long)a * b) >> 32);
}
template <typename T>
MSL_FUNC T extract_bits(T x, uint offset, uint bits) {
  constexpr uint width = 8 * sizeof(T);
  return bits ? (T)((T)(x << (width - bits - offset)) >> (width - bits)) : (T)0;
}

}  // namespace metal
