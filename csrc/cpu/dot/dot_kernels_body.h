// The kernels of one instruction set. Only dot_kernels_<isa>.cpp include this.
#pragma once

#include <cstring>

#include "cpu/runtime/activations.h"
#define GLM_DOT_KERNELS
#include "formats/affine.h"
#include "formats/dense.h"
#include "formats/fp.h"
#include "formats/fp8.h"
#include "swiglu.h"

namespace {

using glm_fused::FloatType;
using glm_fused::cpu::KernelSet;

// GGUF's formats have kernels of their own, gguf_kernels_body.h.
const Kernel& find(const glm_fused::Format& format, bool fast) {
  using glm_fused::Family;
  switch (format.family()) {
    case Family::affine:
      return find_kernel<Family::affine>(format, fast);
    case Family::fp:
      return find_kernel<Family::fp>(format, fast);
    case Family::fp8:
      return find_kernel<Family::fp8>(format, fast);
    default:
      return find_kernel<Family::dense>(format, fast);
  }
}

// A loop of constant length with nothing left to call, which compilers turn
// into vectors.
template <int n, FloatType type>
GLM_FLATTEN void swiglu_of(const float* gate, const float* up, float* act) {
  const glm_fused::As<type> as;
  float out[n];
  for (int i = 0; i < n; i++) {
    out[i] = glm_fused::swiglu(
        glm_fused::round_to(gate[i], as), glm_fused::round_to(up[i], as), as);
  }
  memcpy(act, out, sizeof(out));
}

template <FloatType type>
void swiglu_rows(const float* gate, const float* up, float* act, int count) {
  int i = 0;
  for (; i + kHalf <= count; i += kHalf) {
    swiglu_of<kHalf, type>(gate + i, up + i, act + i);
  }
  for (; i < count; i++) {
    swiglu_of<1, type>(gate + i, up + i, act + i);
  }
}

void swiglu(
    const float* gate,
    const float* up,
    float* act,
    int count,
    FloatType type) {
  switch (type) {
    case FloatType::bfloat16:
      return swiglu_rows<FloatType::bfloat16>(gate, up, act, count);
    case FloatType::float16:
      return swiglu_rows<FloatType::float16>(gate, up, act, count);
    default:
      return swiglu_rows<FloatType::float32>(gate, up, act, count);
  }
}

// Calls each(at, count) for stretches of kHalf values, a constant, and for the
// last values one by one.
template <class Each>
GLM_INLINE void in_stretches(size_t count, const Each& each) {
  size_t i = 0;
  for (; i + kHalf <= count; i += kHalf) {
    each(i, Constant<kHalf>());
  }
  for (; i < count; i++) {
    each(i, Constant<1>());
  }
}

template <FloatType type>
void add_scored_rows(const float* y, float score, size_t count, float* sum) {
  const glm_fused::As<type> as;
  in_stretches(count, [&](size_t at, auto n) GLM_ALWAYS_INLINE {
    float out[n];
    for (int i = 0; i < n; i++) {
      const float term = glm_fused::round_to(y[at + i], as) * score;
      out[i] = sum[at + i] + term;
    }
    memcpy(sum + at, out, sizeof(out));
  });
}

void add_scored(
    const float* y,
    float score,
    size_t count,
    FloatType type,
    float* sum) {
  switch (type) {
    case FloatType::bfloat16:
      return add_scored_rows<FloatType::bfloat16>(y, score, count, sum);
    case FloatType::float16:
      return add_scored_rows<FloatType::float16>(y, score, count, sum);
    default:
      return add_scored_rows<FloatType::float32>(y, score, count, sum);
  }
}

template <FloatType type>
void load_all(const uint8_t* from, size_t count, float* to) {
  using As = glm_fused::As<type>;
  using Code = decltype(As::encode(0.0f));
  in_stretches(count, [&](size_t at, auto n) GLM_ALWAYS_INLINE {
    Code codes[n];
    memcpy(codes, from + at * sizeof(Code), sizeof(codes));
    for (int i = 0; i < n; i++) {
      to[at + i] = As::decode(codes[i]);
    }
  });
}

template <FloatType type>
void store_all(const float* from, size_t count, uint8_t* to) {
  using As = glm_fused::As<type>;
  using Code = decltype(As::encode(0.0f));
  in_stretches(count, [&](size_t at, auto n) GLM_ALWAYS_INLINE {
    Code codes[n];
    for (int i = 0; i < n; i++) {
      codes[i] = As::encode(from[at + i]);
    }
    memcpy(to + at * sizeof(Code), codes, sizeof(codes));
  });
}

void load_floats(const uint8_t* from, FloatType type, size_t count, float* to) {
  switch (type) {
    case FloatType::bfloat16:
      return load_all<FloatType::bfloat16>(from, count, to);
    case FloatType::float16:
      return load_all<FloatType::float16>(from, count, to);
    default:
      return load_all<FloatType::float32>(from, count, to);
  }
}

void store_floats(
    const float* from,
    size_t count,
    FloatType type,
    uint8_t* to) {
  switch (type) {
    case FloatType::bfloat16:
      return store_all<FloatType::bfloat16>(from, count, to);
    case FloatType::float16:
      return store_all<FloatType::float16>(from, count, to);
    default:
      return store_all<FloatType::float32>(from, count, to);
  }
}

uint32_t read(const uint8_t* from, size_t count) {
  constexpr size_t line = kHalf * sizeof(uint32_t);
  U16 folded[4] = {};
  for (size_t at = 0; at + 4 * line <= count; at += 4 * line) {
    unroll<4>(GLM_EACH(i) {
      folded[i] = bits_or(folded[i], load_words(from + at + i * line));
    });
  }
  const U16 all =
      bits_or(bits_or(folded[0], folded[1]), bits_or(folded[2], folded[3]));
  uint32_t words[kHalf], result = 0;
  memcpy(words, &all, sizeof(words));
  for (uint32_t word : words) {
    result |= word;
  }
  return result;
}

}  // namespace
