// Defines the activation types and the float helpers that swiglu.h and
// norm.h ask for.
#pragma once

#include <metal_simdgroup>
#include <metal_stdlib>

using namespace metal;

typedef half float16_t;
typedef bfloat bfloat16_t;

#define GLM_CONST static constant constexpr const

// Loops over a thread's own arrays are unrolled, so that a compiler keeps these
// in registers. Compilers that have none may define it as nothing.
#ifndef GLM_UNROLL
#define GLM_UNROLL _Pragma("clang loop unroll(full)")
#endif

GLM_CONST int kLanes = 32;

METAL_FUNC float larger(float a, float b) {
  return b > a ? b : a;  // a where b is NaN
}

namespace glm_fused {

template <typename T>
struct As {};

static inline float multiply_add(float a, float b, float c) {
  return fma(a, b, c);
}

static inline float square_root(float x) {
  return precise::sqrt(x);
}

static inline uint bits_of(float f) {
  return as_type<uint>(f);
}

static inline float float_of(uint u) {
  return as_type<float>(u);
}

// Rounds a product as such: no compiler contracts it with a sum. Adding 0 makes
// -0 a 0, so the sign is set again.
static inline float product(float a, float b) {
  const uint sign = (bits_of(a) ^ bits_of(b)) & 0x80000000u;
  return float_of(bits_of(multiply_add(a, b, 0.0f)) | sign);
}

template <typename T>
static inline float round_to(float f, As<T>) {
  return static_cast<float>(static_cast<T>(f));
}

}  // namespace glm_fused
