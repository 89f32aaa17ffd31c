// Defines the activation types and the float helpers that swiglu.h asks for.
#pragma once

#include <metal_simdgroup>
#include <metal_stdlib>

using namespace metal;

typedef half float16_t;
typedef bfloat bfloat16_t;

#define GLM_CONST static constant constexpr const

GLM_CONST int kLanes = 32;

namespace glm_fused {

template <typename T>
struct As {};

static inline float multiply_add(float a, float b, float c) {
  return fma(a, b, c);
}

static inline uint bits_of(float f) {
  return as_type<uint>(f);
}

static inline float float_of(uint u) {
  return as_type<float>(u);
}

template <typename T>
static inline float round_to(float f, As<T>) {
  return static_cast<float>(static_cast<T>(f));
}

}  // namespace glm_fused
