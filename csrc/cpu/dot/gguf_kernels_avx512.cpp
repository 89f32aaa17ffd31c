#define GLM_AVX512
#include "cpu/dot/gguf_kernels_body.h"

namespace glm_fused::cpu {

const Kernel& gguf_kernel_avx512(const Format& format) {
  return kernel_of(format);
}

}  // namespace glm_fused::cpu
