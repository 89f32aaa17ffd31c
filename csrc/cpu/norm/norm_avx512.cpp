#define GLM_AVX512
#include "cpu/norm/norm_body.h"

namespace glm_fused::cpu {

void avx512_norm(const NormArgs& args) {
  ::norm(args);
}

}  // namespace glm_fused::cpu
