#include "cpu/norm/norm_kernels.h"

#include <string>

#include "cpu/dot/dot_kernels.h"

namespace glm_fused::cpu {

NormKernel norm_kernel() {
#if defined(__x86_64__)
  const std::string name = kernels().name;
  if (name == "avx512") {
    return avx512_norm;
  }
  if (name == "avx2") {
    return avx2_norm;
  }
#endif
  return portable_norm;
}

}  // namespace glm_fused::cpu
