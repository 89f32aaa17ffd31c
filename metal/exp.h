// This is e^x in fp32, within 0.67 ulp, one text for the shaders and the CPU.
// The includer brings multiply_add, bits_of and float_of.
#pragma once

namespace glm_fused {

// The result for x must be neither subnormal nor infinite. No product is left
// to a compiler's choice whether to contract it: each is an explicit
// multiply_add, and the scaling by 2^n adds to the exponent's bits.
static inline float exp_finite(float x) {
  const float shifter = 12582912.0f;  // 1.5 * 2^23: leaves n in the low bits
  const float shifted = multiply_add(x, 1.44269504f, shifter);
  const float n = shifted - shifter;
  const float head = multiply_add(n, -0.693145752f, x);  // exact
  const float r = multiply_add(n, -1.42860677e-6f, head);
  const float r_rest = multiply_add(n, -1.42860677e-6f, head - r);
  float p = 2.48015873e-5f;
  p = multiply_add(p, r, 1.98412698e-4f);
  p = multiply_add(p, r, 1.38888889e-3f);
  p = multiply_add(p, r, 8.33333333e-3f);
  p = multiply_add(p, r, 4.16666667e-2f);
  p = multiply_add(p, r, 1.66666667e-1f);
  p = multiply_add(p, r, 0.5f);
  // The sum is 1 + r + r^2 p; what rounding 1 + r dropped is added back.
  const float sum = 1.0f + r;
  const float dropped = (1.0f - sum) + r;
  const float tail = multiply_add(r * r, p, dropped) + r_rest;
  return float_of(bits_of(sum + tail) + (bits_of(shifted) << 23));
}

}  // namespace glm_fused
