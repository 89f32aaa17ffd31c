// The norms' kernels, one per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats/format.h"

namespace glm_fused::cpu {

constexpr int kNormBlock = 128;  // columns that 32 lanes take four by four

// What the norm of one row takes. `stride` is in values; `y`, in x's type, the
// weight and the bias are contiguous. Without a bias it is an RMSNorm.
struct NormArgs {
  const uint8_t* x;
  int64_t stride;
  FloatType type;
  int n;
  const uint8_t* weight;
  FloatType weight_type;
  const uint8_t* bias;
  FloatType bias_type;
  float eps;
  float* row;  // norm_spare(n) floats
  uint8_t* y;
};

inline size_t norm_spare(int n) {
  return (static_cast<size_t>(n) + kNormBlock - 1) / kNormBlock * kNormBlock;
}

using NormKernel = void (*)(const NormArgs&);

void portable_norm(const NormArgs& args);
#if defined(__x86_64__)
void avx2_norm(const NormArgs& args);
void avx512_norm(const NormArgs& args);
#endif

// The one of the set that dot_kernels.h picks.
NormKernel norm_kernel();

}  // namespace glm_fused::cpu
