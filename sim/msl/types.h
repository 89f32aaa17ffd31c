// Address spaces, fundamental types and type traits of the Metal Shading
// Language, for clang's C++ for OpenCL.
#pragma once

#pragma OPENCL EXTENSION cl_khr_fp16 : enable

#define device __global
#define threadgroup __local
#define constant const __constant
#define thread __private
#define METAL_FUNC inline __attribute__((always_inline))
// Our own functions have this, so that what they inline to belongs to the
// caller's line.
#define MSL_FUNC METAL_FUNC __attribute__((nodebug))
#define METAL_CONST constant
#define __METAL__ 1
#define __METAL_VERSION__ 310
#define MSL_CONVERGENT __attribute__((convergent))

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef ulong size_t;
typedef long ptrdiff_t;
typedef ulong uintptr_t;
typedef long intptr_t;

#define INFINITY __builtin_inff()
#define HUGE_VALF __builtin_huge_valf()
#define NAN __builtin_nanf("")
#define FLT_MAX __FLT_MAX__
#define FLT_MIN __FLT_MIN__
#define FLT_EPSILON __FLT_EPSILON__
#define MAXFLOAT __FLT_MAX__
#define INT_MAX __INT_MAX__
#define INT_MIN (-__INT_MAX__ - 1)
#define UINT_MAX 4294967295u
#define M_E_F 2.71828182845904523536f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_1_PI_F 0.318309886183790671538f
#define M_2_PI_F 0.636619772367581343076f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.693147180559945309417f
#define M_SQRT2_F 1.41421356237309504880f

namespace metal {

template <typename T, T v>
struct integral_constant {
  static constexpr constant T value = v;
  typedef T value_type;
  typedef integral_constant type;
  constexpr operator T() const {
    return v;
  }
};
template <bool b>
using bool_constant = integral_constant<bool, b>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;

template <bool b, typename T = void>
struct enable_if {};
template <typename T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool b, typename T = void>
using enable_if_t = typename enable_if<b, T>::type;

template <bool b, typename T, typename F>
struct conditional {
  typedef T type;
};
template <typename T, typename F>
struct conditional<false, T, F> {
  typedef F type;
};
template <bool b, typename T, typename F>
using conditional_t = typename conditional<b, T, F>::type;

template <typename T>
struct remove_addrspace {
  typedef T type;
};
#define MSL_REMOVE_ADDRSPACE(space)  \
  template <typename T>              \
  struct remove_addrspace<space T> { \
    typedef T type;                  \
  };
MSL_REMOVE_ADDRSPACE(device)
MSL_REMOVE_ADDRSPACE(threadgroup)
MSL_REMOVE_ADDRSPACE(constant)
MSL_REMOVE_ADDRSPACE(thread)
#undef MSL_REMOVE_ADDRSPACE

template <typename T>
using remove_cv_t = __remove_cv(T);
template <typename T>
using remove_addrspace_t = remove_cv_t<typename remove_addrspace<T>::type>;
template <typename T>
using remove_reference_t = __remove_reference_t(T);
template <typename T>
struct remove_cv {
  typedef remove_cv_t<T> type;
};
template <typename T>
struct remove_const {
  typedef T type;
};
template <typename T>
struct remove_const<const T> {
  typedef T type;
};
template <typename T>
using remove_const_t = typename remove_const<T>::type;
template <typename T>
struct remove_reference {
  typedef remove_reference_t<T> type;
};

template <typename A, typename B>
constexpr constant bool is_same_v = __is_same(A, B);
template <typename A, typename B>
struct is_same : bool_constant<__is_same(A, B)> {};
template <typename A, typename B>
constexpr constant bool is_convertible_v = __is_convertible(A, B);
template <typename A, typename B>
struct is_convertible : bool_constant<__is_convertible(A, B)> {};

struct bfloat;

template <typename T>
struct is_integral : bool_constant<__is_integral(T)> {};
template <typename T>
struct is_floating_point
    : bool_constant<__is_floating_point(T) || __is_same(T, bfloat)> {};
template <typename T>
struct is_arithmetic
    : bool_constant<__is_arithmetic(T) || __is_same(T, bfloat)> {};
template <typename T>
struct is_pointer : bool_constant<__is_pointer(T)> {};
template <typename T>
struct is_signed : bool_constant<__is_signed(T) || __is_same(T, bfloat)> {};
template <typename T>
struct is_unsigned : bool_constant<__is_unsigned(T)> {};

#define MSL_TRAIT_VALUE(trait) \
  template <typename T>        \
  constexpr constant bool trait##_v = trait<T>::value;
MSL_TRAIT_VALUE(is_integral)
MSL_TRAIT_VALUE(is_floating_point)
MSL_TRAIT_VALUE(is_arithmetic)
MSL_TRAIT_VALUE(is_pointer)
MSL_TRAIT_VALUE(is_signed)
MSL_TRAIT_VALUE(is_unsigned)
#undef MSL_TRAIT_VALUE

template <typename...>
struct _disjunction : false_type {};
template <typename T, typename... Rest>
struct _disjunction<T, Rest...>
    : bool_constant<T::value || _disjunction<Rest...>::value> {};

}  // namespace metal

// Returns the same bits as another type, which must have the same size.
template <typename To, typename From>
MSL_FUNC To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// Operands of `?:` become values (see rewrite.py): clang finds no common type
// for a class object in one address space and one in another.
template <typename T>
MSL_FUNC constexpr T msl_operand(T value) {
  return value;
}

// MLX's gemv marks values that all threads share; here every value may differ.
namespace metal {
template <typename T>
using uniform = T;
template <typename T>
inline constexpr T make_uniform(T value) {
  return value;
}
}  // namespace metal
