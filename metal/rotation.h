// A pair of columns, rotated by an angle with this cosine and sine.
#pragma once

#include "numbers.h"

struct Rotated {
  float first;
  float second;
};

METAL_FUNC Rotated rotated(float a, float b, float cosine, float sine) {
  using glm_fused::product;
  return {
      product(a, cosine) - product(b, sine),
      product(b, cosine) + product(a, sine)};
}
