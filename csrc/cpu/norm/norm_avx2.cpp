#define GLM_AVX2
#include "cpu/norm/norm_body.h"

namespace glm_fused::cpu {

void avx2_norm(const NormArgs& args) {
  ::norm(args);
}

}  // namespace glm_fused::cpu
