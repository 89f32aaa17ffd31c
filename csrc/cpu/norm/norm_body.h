// The norm of a row, compiled once per instruction set. Loops over a block have
// a constant count, which compilers turn into vectors.
#pragma once

#include <cstring>

#include "cpu/norm/norm_kernels.h"
#include "cpu/runtime/activations.h"
#include "cpu/runtime/simd.h"
#include "norm.h"

namespace {

using glm_fused::As;
using glm_fused::FloatType;
using glm_fused::cpu::NormArgs;

constexpr int kBlock = glm_fused::cpu::kNormBlock;

template <FloatType type>
using Code = decltype(As<type>::encode(0.0f));

// Loads `count` values, and zeros up to the block's end.
template <FloatType type>
GLM_INLINE void
load_block(const uint8_t* from, int64_t stride, int count, float* out) {
  Code<type> codes[kBlock] = {};
  if (stride == 1) {
    memcpy(codes, from, count * sizeof(Code<type>));
  } else {
    constexpr auto item = static_cast<int64_t>(sizeof(Code<type>));
    for (int i = 0; i < count; i++) {
      memcpy(&codes[i], from + i * stride * item, item);
    }
  }
  for (int i = 0; i < kBlock; i++) {
    out[i] = As<type>::decode(codes[i]);
  }
}

// Loads a block of a weight or a bias from column `at` on.
void load_columns(
    const uint8_t* from,
    FloatType type,
    int at,
    int count,
    float* out) {
  from += at * static_cast<int64_t>(size_of(type));
  switch (type) {
    case FloatType::float32:
      return load_block<FloatType::float32>(from, 1, count, out);
    case FloatType::float16:
      return load_block<FloatType::float16>(from, 1, count, out);
    default:
      return load_block<FloatType::bfloat16>(from, 1, count, out);
  }
}

template <FloatType type>
GLM_INLINE void store_block(const float* values, int count, uint8_t* out) {
  Code<type> codes[kBlock];
  for (int i = 0; i < kBlock; i++) {
    codes[i] = As<type>::encode(values[i]);
  }
  memcpy(out, codes, count * sizeof(Code<type>));
}

// Sums a row, which ends with zeros, in the lanes' order: add(sum, values).
template <class Add>
GLM_INLINE float sum_over(const float* row, int blocks, const Add& add) {
  constexpr int half = kBlock / 2;
  F16 low = zero(), high = zero();
  for (const float* p = row; p != row + blocks * kBlock; p += kBlock) {
    F16 v[4], w[4];
    load_quads(reinterpret_cast<const uint8_t*>(p), v);
    load_quads(reinterpret_cast<const uint8_t*>(p + half), w);
    unroll<4>(GLM_EACH(i) {
      low = add(low, v[i]);
      high = add(high, w[i]);
    });
  }
  return butterfly_sum(low, high);
}

template <FloatType type>
void norm_of(const NormArgs& a) {
  const int blocks = (a.n + kBlock - 1) / kBlock;
  const auto each = [&](auto&& block) {
    for (int at = 0; at < a.n; at += kBlock) {
      block(at, a.n - at < kBlock ? a.n - at : kBlock);
    }
  };
  each([&](int at, int count) {
    const int64_t bytes = static_cast<int64_t>(size_of(type)) * a.stride;
    load_block<type>(a.x + at * bytes, a.stride, count, a.row + at);
  });
  if (a.bias != nullptr) {
    const float sum =
        sum_over(a.row, blocks, [](F16 sum, F16 v) { return add(sum, v); });
    const float mean = sum / static_cast<float>(a.n);
    for (int i = 0; i < a.n; i++) {
      a.row[i] = a.row[i] - mean;
    }
  }
  const float squares =
      sum_over(a.row, blocks, [](F16 sum, F16 v) { return fma(v, v, sum); });
  const float inverse = glm_fused::inverse_root(squares, a.n, a.eps);
  each([&](int at, int count) {
    float weight[kBlock], bias[kBlock], y[kBlock];
    const float* x = a.row + at;
    load_columns(a.weight, a.weight_type, at, count, weight);
    if (a.bias == nullptr) {
      for (int i = 0; i < kBlock; i++) {
        y[i] = glm_fused::normed(x[i], inverse, weight[i], As<type>());
      }
    } else {
      load_columns(a.bias, a.bias_type, at, count, bias);
      for (int i = 0; i < kBlock; i++) {
        y[i] = glm_fused::normed(x[i], inverse, weight[i], bias[i], As<type>());
      }
    }
    store_block<type>(y, count, a.y + at * static_cast<int64_t>(size_of(type)));
  });
}

void norm(const NormArgs& args) {
  switch (args.type) {
    case FloatType::float32:
      return norm_of<FloatType::float32>(args);
    case FloatType::float16:
      return norm_of<FloatType::float16>(args);
    default:
      return norm_of<FloatType::bfloat16>(args);
  }
}

}  // namespace
