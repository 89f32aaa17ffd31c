// What a norm does with the sums over a row, one text for the shaders and the
// CPU. The includer brings product, square_root and round_to for its Type.
#pragma once

namespace glm_fused {

// Gives 1 / sqrt(mean + eps), where the squares of `n` values have this sum.
static inline float inverse_root(float squares, int n, float eps) {
  const float mean = squares / static_cast<float>(n);
  return 1.0f / square_root(mean + eps);
}

// The caller rounds what these give to the Type when it stores it.
template <typename Type>
static inline float normed(float x, float inverse, float weight, Type type) {
  return product(round_to(x * inverse, type), weight);
}
template <typename Type>
static inline float
normed(float x, float inverse, float weight, float bias, Type type) {
  return round_to(normed(x, inverse, weight, type), type) + bias;
}

}  // namespace glm_fused
