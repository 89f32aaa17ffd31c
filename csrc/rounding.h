// These round fp32 values to the activation types and store them as such.
#pragma once

#include <cstdint>
#include <cstring>

#include "formats/format.h"

namespace glm_fused {
namespace {  // internal linkage: compiled once per instruction set

inline uint32_t bits_of(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

inline uint16_t to_bfloat16(float f) {
  const uint32_t u = bits_of(f);
  const uint32_t rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  const bool is_nan = (u & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>(is_nan ? u >> 16 | 0x40u : rounded);
}
inline float from_bfloat16(uint16_t h) {
  return float_of(static_cast<uint32_t>(h) << 16);
}

inline uint16_t to_float16(float f) {
  const uint32_t u = bits_of(f), sign = u >> 16 & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return static_cast<uint16_t>(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
  }
  if (magnitude >= 0x477ff000u) {  // rounds past 65504
    return static_cast<uint16_t>(sign | 0x7c00u);
  }
  if (magnitude < 0x38800000u) {  // subnormal half: let fp32 addition round
    const float shifted = float_of(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_of(shifted) - 0x3f000000u));
  }
  const uint32_t odd = magnitude >> 13 & 1u;
  return static_cast<uint16_t>(
      sign | (magnitude - 0x38000000u + 0xfffu + odd) >> 13);
}
inline float from_float16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) {
    const uint32_t payload = (magnitude & 0x3ffu) << 13;
    return float_of(sign | 0x7f800000u | payload | (payload ? 0x400000u : 0u));
  }
  if (magnitude < 0x400u) {
    const float f = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -f : f;
  }
  return float_of(sign | ((magnitude << 13) + 0x38000000u));
}

inline float round_to(float f, FloatType type) {
  switch (type) {
    case FloatType::bfloat16:
      return from_bfloat16(to_bfloat16(f));
    case FloatType::float16:
      return from_float16(to_float16(f));
    default:
      return f;
  }
}

}  // namespace
}  // namespace glm_fused
