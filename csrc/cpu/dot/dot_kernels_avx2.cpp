#define GLM_AVX2
#include "cpu/dot/dot_kernels_body.h"

namespace glm_fused::cpu {

const KernelSet& avx2_kernels() {
  static constexpr KernelSet set{
      "avx2",
      find,
      gguf_kernel_avx2,
      ::swiglu,
      add_scored,
      load_floats,
      store_floats,
      ::read};
  return set;
}

}  // namespace glm_fused::cpu
