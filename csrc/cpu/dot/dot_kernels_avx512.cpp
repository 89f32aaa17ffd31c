#define GLM_AVX512
#include "cpu/dot/dot_kernels_body.h"

namespace glm_fused::cpu {

const KernelSet& avx512_kernels() {
  static constexpr KernelSet set{
      "avx512",
      find,
      gguf_kernel_avx512,
      ::swiglu,
      add_scored,
      load_floats,
      store_floats,
      ::read};
  return set;
}

}  // namespace glm_fused::cpu
