#include "cpu/dot/dot_kernels_body.h"

namespace glm_fused::cpu {

const KernelSet& portable_kernels() {
  static constexpr KernelSet set{
      "portable",
      find,
      gguf_kernel_portable,
      ::swiglu,
      add_scored,
      load_floats,
      store_floats,
      ::read};
  return set;
}

}  // namespace glm_fused::cpu
