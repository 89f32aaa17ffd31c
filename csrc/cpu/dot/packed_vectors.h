// How vectors are packed for a format's dot products.
#pragma once

#include <cstring>

#include "cpu/dot/lanes.h"

namespace {

// Whether terms p and p + 4 of the same lane lie side by side
// (interleave_lanes), those of half of the lanes in either.
template <class F>
constexpr bool kInterleaves = requires { requires F::kInterleaves; };

// Packed x: per block and half, kTerms terms of 16 lanes, then the lane sums
// that multiply a bias.
template <class F>
constexpr int vectors_per_half = F::kTerms + (F::kSumStep ? 1 : 0);
template <class F>
constexpr int floats_per_block = 2 * vectors_per_half<F> * kHalf;

// Sets v[i] to value i of every lane; before, the lanes' values follow one
// another.
template <int n>
GLM_INLINE void by_value(F16 (&v)[n]) {
  if constexpr (n > 1) {
    F16 even[n / 2], odd[n / 2];
    unroll<n / 2>(
        GLM_EACH(i) { split_lanes(v[2 * i], v[2 * i + 1], even[i], odd[i]); });
    by_value(even);
    by_value(odd);
    unroll<n / 2>(GLM_EACH(i) {
      v[2 * i] = even[i];
      v[2 * i + 1] = odd[i];
    });
  }
}

template <class F>
GLM_INLINE F16 lane_sums(const F16 (&x)[F::kValues]) {
  F16 sum = zero();
  unroll<F::kValues / F::kSumStep>(GLM_EACH(j) {
    F16 part = x[j * F::kSumStep];
    for (int i = 1; i < F::kSumStep; i++) {
      part = add(part, x[j * F::kSumStep + i]);
    }
    sum = add(sum, part);
  });
  return sum;
}

template <class F>
void pack(const float* x, int k, float* panel, int m, int width) {
  constexpr int values = kHalf * F::kValues;
  float* out = panel + m * kHalf;
  for (int base = 0; base < k; base += values) {
    float padded[values];
    const float* from = x + base;
    if (k - base < values) {
      memset(padded, 0, sizeof(padded));
      memcpy(padded, from, (k - base) * sizeof(float));
      from = padded;
    }
    F16 v[F::kValues];
    unroll<F::kValues>(GLM_EACH(i) { v[i] = load(from + i * kHalf); });
    by_value(v);
    if constexpr (kInterleaves<F>) {
      for_each_constant<F::kValues>(GLM_EACH(i) {
        if constexpr (i % 8 < 4) {
          interleave_lanes(v[i], v[i + 4]);
        }
      });
    }
    for_each_constant<F::kTerms>(GLM_EACH(p) {
      constexpr Term t = F::term(p);
      const F16 scaled = mul(mul(v[t.value], splat(t.scale)), splat(t.carry));
      store(out + p * width * kHalf, scaled);
    });
    if constexpr (F::kSumStep > 0) {
      store(out + F::kTerms * width * kHalf, lane_sums<F>(v));
    }
    out += vectors_per_half<F> * width * kHalf;
  }
}

}  // namespace
