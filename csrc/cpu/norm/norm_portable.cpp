#include "cpu/norm/norm_body.h"

namespace glm_fused::cpu {

void portable_norm(const NormArgs& args) {
  ::norm(args);
}

}  // namespace glm_fused::cpu
