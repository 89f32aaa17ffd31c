// The types of activations as the shaders name them, each a type of its own, so
// that loops over values of one type have no branch.
#pragma once

#include "cpu/runtime/simd.h"
#include "rounding.h"

namespace glm_fused {
namespace {

// The shaders' name for an activation type.
template <FloatType type>
struct As {
  static float decode(uint16_t code) {
    return from_bfloat16(code);
  }
  static uint16_t encode(float value) {
    return to_bfloat16(value);
  }
};
template <>
struct As<FloatType::float16> {
#if defined(GLM_AVX512) || defined(GLM_AVX2)
  static float decode(uint16_t code) {
    return _cvtsh_ss(code);
  }
  static uint16_t encode(float value) {
    return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
  }
#else
  static float decode(uint16_t code) {
    return from_float16(code);
  }
  static uint16_t encode(float value) {
    return to_float16(value);
  }
#endif
};
template <>
struct As<FloatType::float32> {
  static float decode(float value) {
    return value;
  }
  static float encode(float value) {
    return value;
  }
};

template <FloatType type>
GLM_INLINE float round_to(float value, As<type>) {
  return As<type>::decode(As<type>::encode(value));
}

}  // namespace
}  // namespace glm_fused
