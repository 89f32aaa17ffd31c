// bfloat is a class, so that the compiler itself refuses what Metal refuses:
// float and half do not convert to it implicitly.
#pragma once

#include "types.h"

namespace metal {

template <typename T>
constexpr constant bool msl_is_builtin = __is_arithmetic(T);

struct bfloat {
  ushort bits;

  bfloat() = default;
  bfloat(const bfloat&) = default;
  bfloat& operator=(const bfloat&) = default;

  // A template is never a copy constructor, so the class stays trivial.
  template <typename T, enable_if_t<__is_same(T, bfloat), int> = 0>
  MSL_FUNC constexpr bfloat(const __constant T& other) : bits(other.bits) {}

  template <typename T, enable_if_t<__is_same(T, bfloat), int> = 0>
  MSL_FUNC constexpr bfloat& operator=(const __constant T& other) {
    bits = other.bits;
    return *this;
  }

  template <typename T, enable_if_t<__is_integral(T), int> = 0>
  MSL_FUNC constexpr bfloat(T value) : bits(round((float)value)) {}
  template <typename T, enable_if_t<__is_floating_point(T), int> = 0>
  MSL_FUNC constexpr explicit bfloat(T value) : bits(round((float)value)) {}

  template <typename T, enable_if_t<__is_same(T, float), int> = 0>
  MSL_FUNC constexpr operator T() const {
    return widen(bits);
  }
  template <typename T, enable_if_t<__is_same(T, float), int> = 0>
  MSL_FUNC constexpr operator T() const __constant {
    return widen(bits);
  }
  template <
      typename T,
      enable_if_t<msl_is_builtin<T> && !__is_same(T, float), int> = 0>
  MSL_FUNC constexpr explicit operator T() const {
    return (T)widen(bits);
  }
  template <
      typename T,
      enable_if_t<msl_is_builtin<T> && !__is_same(T, float), int> = 0>
  MSL_FUNC constexpr explicit operator T() const __constant {
    return (T)widen(bits);
  }

  MSL_FUNC static constexpr float widen(ushort bits) {
    return __builtin_bit_cast(float, (uint)bits << 16);
  }
  // Rounds to nearest, ties to even; NaN stays a (quiet) NaN.
  MSL_FUNC static constexpr ushort round(float value) {
    uint u = __builtin_bit_cast(uint, value);
    return (u & 0x7fffffffu) > 0x7f800000u
        ? (ushort)(u >> 16 | 0x40)
        : (ushort)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
  }
};

// bfloat with bfloat or an integer stays bfloat; with float it becomes float.
template <typename A, typename B>
constexpr constant bool msl_bfloat_pair =
    (__is_same(A, bfloat) && (__is_same(B, bfloat) || __is_integral(B))) ||
    (__is_integral(A) && __is_same(B, bfloat));
template <typename A, typename B>
constexpr constant bool msl_bfloat_float_pair =
    (__is_same(A, bfloat) && __is_floating_point(B)) ||
    (__is_floating_point(A) && __is_same(B, bfloat));

#define MSL_BFLOAT_ARITHMETIC(op)                                         \
  template <                                                              \
      typename A,                                                         \
      typename B,                                                         \
      enable_if_t<msl_bfloat_pair<A, B>, int> = 0>                        \
  MSL_FUNC constexpr bfloat operator op(A a, B b) {                       \
    return bfloat((float)a op(float) b);                                  \
  }                                                                       \
  template <                                                              \
      typename A,                                                         \
      typename B,                                                         \
      enable_if_t<msl_bfloat_float_pair<A, B>, int> = 0>                  \
  MSL_FUNC constexpr float operator op(A a, B b) {                        \
    return (float)a op(float) b;                                          \
  }                                                                       \
  template <typename B, enable_if_t<msl_bfloat_pair<bfloat, B>, int> = 0> \
  MSL_FUNC constexpr bfloat& operator op## = (bfloat & a, B b) {          \
    return a = a op b;                                                    \
  }
MSL_BFLOAT_ARITHMETIC(+)
MSL_BFLOAT_ARITHMETIC(-)
MSL_BFLOAT_ARITHMETIC(*)
MSL_BFLOAT_ARITHMETIC(/)
#undef MSL_BFLOAT_ARITHMETIC

#define MSL_BFLOAT_COMPARE(op)                                                 \
  template <                                                                   \
      typename A,                                                              \
      typename B,                                                              \
      enable_if_t<msl_bfloat_pair<A, B> || msl_bfloat_float_pair<A, B>, int> = \
          0>                                                                   \
  MSL_FUNC constexpr bool operator op(A a, B b) {                              \
    return (float)a op(float) b;                                               \
  }
MSL_BFLOAT_COMPARE(==)
MSL_BFLOAT_COMPARE(!=)
MSL_BFLOAT_COMPARE(<)
MSL_BFLOAT_COMPARE(<=)
MSL_BFLOAT_COMPARE(>)
MSL_BFLOAT_COMPARE(>=)
#undef MSL_BFLOAT_COMPARE

MSL_FUNC constexpr bfloat operator-(bfloat a) {
  return bfloat(-(float)a);
}
MSL_FUNC constexpr bfloat operator+(bfloat a) {
  return a;
}
MSL_FUNC constexpr bool operator!(bfloat a) {
  return (float)a == 0.0f;
}

}  // namespace metal

using metal::bfloat;
