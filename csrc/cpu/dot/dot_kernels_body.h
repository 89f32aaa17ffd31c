// The kernels of one instruction set. Included by kernels_<isa>.cpp only.
#pragma once

#include <cstring>

#include "cpu/dot/dot_body.h"
#include "swiglu.h"

namespace {

using glm_fused::Format;
using glm_fused::Mode;
using glm_fused::cpu::KernelSet;

template <int bits>
const Kernel& find_affine(bool fast) {
  return fast ? kernel<Affine<bits, true>, AffineScales>
              : kernel<Affine<bits, false>, AffineScales>;
}

const Kernel& find(const Format& f, bool fast) {
  using enum FloatType;
  switch (f.mode) {
    case Mode::mxfp4:
      return fast ? kernel<Fp4<true>, E8M0Scales>
                  : kernel<Fp4<false>, E8M0Scales>;
    case Mode::nvfp4:
      return fast ? kernel<Fp4<true>, E4M3Scales>
                  : kernel<Fp4<false>, E4M3Scales>;
    case Mode::mxfp8:
      return fast ? kernel<Fp8<true>, E8M0Scales>
                  : kernel<Fp8<false>, E8M0Scales>;
    case Mode::affine:
      switch (f.bits) {
        case 2:
          return find_affine<2>(fast);
        case 3:
          return find_affine<3>(fast);
        case 4:
          return find_affine<4>(fast);
        case 5:
          return find_affine<5>(fast);
        case 6:
          return find_affine<6>(fast);
        default:
          return find_affine<8>(fast);
      }
    default:
      break;
  }
  return f.float_type == float32 ? kernel<Dense<float32>, NoScales>
      : f.float_type == float16  ? kernel<Dense<float16>, NoScales>
                                 : kernel<Dense<bfloat16>, NoScales>;
}

void swiglu(
    const float* gate,
    const float* up,
    float* act,
    int count,
    FloatType type) {
  for (int i = 0; i < count; i++) {
    act[i] = glm_fused::swiglu(
        glm_fused::round_to(gate[i], type),
        glm_fused::round_to(up[i], type),
        type);
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
