#include "cpu/dot/dot_kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace glm_fused::cpu {

namespace {

const KernelSet& best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return avx512_kernels();
  }
  if (avx2) {
    return avx2_kernels();
  }
#endif
  return portable_kernels();
}

const KernelSet& choose() {
  const char* name = std::getenv("GLM_FUSED_KERNELS");
  const KernelSet& widest = best();
  if (name == nullptr || *name == '\0' || std::string(name) == widest.name) {
    return widest;
  }
  if (std::string(name) == "portable") {
    return portable_kernels();
  }
#if defined(__x86_64__)
  if (std::string(name) == "avx2" && &widest == &avx512_kernels()) {
    return avx2_kernels();
  }
#endif
  throw std::invalid_argument(
      "GLM_FUSED_KERNELS=" + std::string(name) +
      " cannot run here: this processor's best is \"" + widest.name +
      "\" (choices: avx512, avx2, portable).");
}

}  // namespace

const KernelSet& kernels() {
  static const KernelSet& set = choose();
  return set;
}

}  // namespace glm_fused::cpu
