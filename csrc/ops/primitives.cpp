#include "primitives.h"

#include <stdexcept>

namespace glm_fused {

void FusedPrimitive::eval_gpu(
    const std::vector<mx::array>&,
    std::vector<mx::array>&) {
  throw std::runtime_error(
      "[" + std::string(name()) +
      "] has no GPU kernel in this build; "
      "run it on a CPU stream.");
}

}  // namespace glm_fused
